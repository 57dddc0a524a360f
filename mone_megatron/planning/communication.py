"""Counts what a rank sends in one step, by group and operation, from the config alone.

Bytes are those that the busiest rank of a pipeline stage sends. A ring over g ranks sends
(g - 1) / g of a tensor for a gathering or a scattered reduction and twice that for an all-reduce;
an all-to-all sends what is not for the rank itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.methods.rule import count_kept
from mone_megatron.planning import activations
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.attention import head_dim_of, projections
from mone_megatron.planning.layout import Group, groups
from mone_megatron.planning.shards import (
    StageState,
    expert_width,
    layer_kinds,
    prediction_kinds,
)


@dataclass(frozen=True)
class Traffic:
    """Describes one kind of communication of one rank over a step."""

    group: Group
    operation: str
    # Sent by the rank, for each microbatch or (once) for the whole step.
    bytes: float
    once: bool = False

    def of_step(self, layout: Layout) -> float:
        """Returns the bytes sent in a step."""
        return self.bytes * (1 if self.once else layout.num_microbatches)


def stage_traffic(
    config: Config, layout: Layout, state: StageState, stage: int, numerics: Numerics
) -> list[Traffic]:
    """Returns everything that a rank of a pipeline stage sends, one item per group and operation.
    Groups of one rank send nothing and are left out.
    """
    found = [
        *_layers(config, layout, stage, numerics),
        *_edges(config, layout, stage, numerics),
        *_pipeline(config, layout, stage, numerics),
        *_data(config, layout, state, numerics),
    ]
    merged: dict[tuple[str, str, bool], Traffic] = {}
    for item in found:
        key = (item.group.name, item.operation, item.once)
        before = merged[key].bytes if key in merged else 0.0
        merged[key] = Traffic(item.group, item.operation, before + item.bytes, item.once)
    return [item for item in merged.values() if item.group.size > 1 and item.bytes > 0]


def _ring(size: float, group: Group) -> float:
    return size * (group.size - 1) / group.size


def _layers(config: Config, layout: Layout, stage: int, numerics: Numerics) -> Iterator[Traffic]:
    kinds: Counter[bool] = Counter()
    for chunk in range(config.parallel.virtual_pipeline):
        kinds += layer_kinds(config, stage, chunk)
    kinds += prediction_kinds(config, stage)
    for moe, count in kinds.items():
        for item in _layer(config, layout, numerics, moe=moe):
            yield replace(item, bytes=count * item.bytes)


def _layer(config: Config, layout: Layout, numerics: Numerics, *, moe: bool) -> Iterator[Traffic]:
    yield from _attention(config, layout, numerics)
    if moe:
        yield from _moe(config, layout, numerics)
        return
    again = config.train.recompute == "full" or (
        config.train.recompute == "selective" and config.model.num_experts == 0
    )
    yield from _split_block(config, layout, numerics, again=again)


def _split_block(
    config: Config, layout: Layout, numerics: Numerics, *, again: bool
) -> Iterator[Traffic]:
    """Yields what two projections send, with the sequence gathered before and scattered behind
    them.

    The backward pass gathers the input once more, for the gradient of the weight.
    """
    group = groups(config.parallel, layout)["tensor"]
    size = activations.tokens_of_rank(config) * config.model.hidden_size * numerics.bytes
    yield Traffic(group, "all-gather", (4 if again else 3) * _ring(size, group))
    yield Traffic(group, "reduce-scatter", (3 if again else 2) * _ring(size, group))


def _attention(config: Config, layout: Layout, numerics: Numerics) -> Iterator[Traffic]:
    if config.model.attention == "mla":
        yield from _latent_attention(config, layout, numerics)
        return
    full = config.train.recompute == "full"
    yield from _split_block(config, layout, numerics, again=full)
    model, context = config.model, groups(config.parallel, layout)["context"]
    keys = 2 * model.num_query_groups * head_dim_of(model) // config.parallel.tensor
    block = activations.tokens_of_rank(config) * keys * numerics.bytes
    if model.qk_norm and model.qk_norm_scope == "all_heads":
        # Sums of squares of queries and of keys, and backwards their gradients.
        tensor = groups(config.parallel, layout)["tensor"]
        sums = 2 * 4 * activations.tokens_of_rank(config)
        yield Traffic(tensor, "all-reduce", (3 if full else 2) * 2 * _ring(sums, tensor))
    again = config.train.recompute != "none"
    if not numerics.own_attention:
        # Keys and values go round; backwards their gradients, too.
        ring = (3 + again) * block * (context.size - 1)
        yield Traffic(context, "ring of keys and values", ring)
        return
    # Keys and values of all are gathered, and backwards their gradients added up.
    yield Traffic(context, "all-gather", (1 + again) * block * (context.size - 1))
    yield Traffic(context, "reduce-scatter", float(block * (context.size - 1)))


def _latent_attention(config: Config, layout: Layout, numerics: Numerics) -> Iterator[Traffic]:
    """Yields what MLA sends: its up projections gather what they read, and the key that carries the
    position is gathered.

    Down projections work on the split sequence; their weights' gradients are added up.
    """
    model, group = config.model, groups(config.parallel, layout)["tensor"]
    mla, hidden = model.mla, model.hidden_size
    again = config.train.recompute == "full"
    value = activations.tokens_of_rank(config) * numerics.bytes
    read = (mla.q_lora_rank or hidden) + mla.kv_lora_rank
    position = mla.qk_rope_head_dim
    gathered = (2 + again) * read + (1 + again) * position + hidden
    scattered = read + position + (1 + again) * hidden
    yield Traffic(group, "all-gather", _ring(value * gathered, group))
    yield Traffic(group, "reduce-scatter", _ring(value * scattered, group))
    whole = sum(matrix.parameters for matrix in projections(model) if not matrix.split)
    yield Traffic(group, "all-reduce", 2 * _ring(4 * whole, group), once=True)


def _moe(config: Config, layout: Layout, numerics: Numerics) -> Iterator[Traffic]:
    model, parallel, e = config.model, config.parallel, numerics.bytes
    named, hidden = groups(parallel, layout), model.hidden_size
    again = config.train.recompute != "none"
    forward, backward = (2 if again else 1), 1
    split = activations.split_tokens(config)
    if parallel.dispatcher == "allgather":
        group = named["expert_and_tensor"]
        tokens = split * group.size
        # Tokens, fp32 probabilities and the routing map; outputs are reduced in fp32.
        gathered = tokens * (hidden * e + 5 * model.num_experts)
        yield Traffic(
            group,
            "all-gather",
            _ring(forward * gathered + backward * tokens * hidden * 4, group),
        )
        back = tokens * (hidden * e + 4 * model.num_experts)
        yield Traffic(
            group,
            "reduce-scatter",
            _ring(forward * tokens * hidden * 4 + backward * back, group),
        )
    else:
        group, inner = named["expert"], named["expert_tensor"]
        rows = split * model.experts_per_token
        # There with their probabilities and back; backwards the gradients of both.
        once = rows * (2 * hidden * e + 4)
        yield Traffic(group, "all-to-all", (forward + backward) * _ring(once, group))
        all_rows = rows * inner.size
        there, back = all_rows * (hidden * e + 4), all_rows * hidden * 4
        yield Traffic(inner, "all-gather", _ring(forward * there + backward * back, inner))
        yield Traffic(inner, "reduce-scatter", _ring(forward * back + backward * there, inner))
    if activations.selects_neurons(config, "routed", model.expert_ffn_hidden_size):
        # The exact top-k over neurons that lie on several ranks asks for each rank's best.
        inner = named["expert_tensor"]
        best = min(
            count_kept(config.mone.keep_ratio, model.expert_ffn_hidden_size),
            expert_width(config),
        )
        sent = activations.expert_rows(config) * best * e * (inner.size - 1)
        yield Traffic(inner, "all-gather of neuron scores", forward * sent)
    inner = named["expert_tensor"]
    latent = activations.expert_rows(config) * activations.gate_latent(config) * e
    yield Traffic(inner, "all-gather of gate latents", forward * _ring(latent, inner))
    yield Traffic(inner, "all-reduce of gate latents", backward * 2 * _ring(latent, inner))
    if model.shared_expert_ffn_hidden_size:
        yield from _split_block(config, layout, numerics, again=again)


def _edges(config: Config, layout: Layout, stage: int, numerics: Numerics) -> Iterator[Traffic]:
    """Yields what the embedding sends on the first stage, and the output layer on the last, which
    multi-token prediction asks once more for each of its layers, beside what joins them.
    """
    group = groups(config.parallel, layout)["tensor"]
    tokens = activations.tokens_of_rank(config)
    size = _ring(tokens * config.model.hidden_size * numerics.bytes, group)
    if stage == 0:
        yield Traffic(group, "reduce-scatter", size)
        yield Traffic(group, "all-gather", size)
    if stage == config.parallel.pipeline - 1:
        depth = config.model.mtp.depth
        yield Traffic(group, "all-gather", (1 + depth) * 2 * size)
        yield Traffic(group, "reduce-scatter", (1 + depth) * size)
        # Maximum, the label's logit and the sum of exponentials of each token.
        yield Traffic(group, "all-reduce", (1 + depth) * 2 * _ring(3 * 4 * tokens, group))
        # The embedding of a later token, as on the first stage. The matrix that joins it to the
        # layer below reads twice the width, and its output is gathered and split again.
        forward = 2 if config.train.recompute == "full" else 1
        yield Traffic(group, "all-gather", depth * size * (1 + forward * (2 + 1) + 2 + 1))
        yield Traffic(group, "reduce-scatter", depth * size * (1 + 2))


def _pipeline(config: Config, layout: Layout, stage: int, numerics: Numerics) -> Iterator[Traffic]:
    parallel = config.parallel
    group = groups(parallel, layout)["pipeline"]
    size = activations.split_tokens(config) * config.model.hidden_size * numerics.bytes
    chunks, last = parallel.virtual_pipeline, parallel.pipeline - 1
    sent = (chunks - (stage == last)) + (chunks - (stage == 0))
    yield Traffic(group, "send", float(sent * size))


def _data(
    config: Config, layout: Layout, state: StageState, numerics: Numerics
) -> Iterator[Traffic]:
    named = groups(config.parallel, layout)
    # Experts that are sharded otherwise have an optimizer of their own, and unless parameters are
    # gathered in the forward pass each of the two optimizers has megatron-core gather all of them.
    times = 1 if config.parallel.overlap_param_gather or not state.experts else 2
    for group, elements in (
        (named["data"], state.dense_elements),
        (named["expert_data"], state.expert_elements),
    ):
        if state.sharded:
            yield Traffic(group, "gradient reduce-scatter", _ring(4 * elements, group), once=True)
            gathered = times * _ring(numerics.bytes * elements, group)
            yield Traffic(group, "parameter all-gather", gathered, once=True)
        else:
            yield Traffic(group, "gradient all-reduce", 2 * _ring(4 * elements, group), once=True)
