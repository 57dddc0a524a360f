"""Counts the memory of a rank at its peak, from the config alone.

Weights, gradients, masters and moments are exact (:mod:`.shards`). Activations are those of
:mod:`.activations` for every microbatch in flight; then comes what lives for an operation only:
the layer that is recomputed, temporaries of the experts or of the loss, and of the optimizer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config, ParallelConfig
from mone_megatron.planning import activations
from mone_megatron.planning.activations import Numerics
from mone_megatron.planning.layout import Place, place_of
from mone_megatron.planning.shards import (
    StageState,
    StateBytes,
    expert_width,
    layer_kinds,
    local_experts,
    prediction_kinds,
    stage_state,
)

# Elements of logits that the loss takes at a time on a GPU (model/cross_entropy.py).
LOSS_BLOCK = 2**25


@dataclass(frozen=True)
class StageMemory:
    """Holds what all ranks of a pipeline stage have in common; sizes are bytes."""

    stage: int
    state: StageState
    # Forward passes of a chunk whose backward pass is still to come, at most.
    in_flight: int
    # Kept by all of them, by what it is.
    activations: dict[str, int]
    # For an operation only, forward and backward pass.
    temporaries: dict[str, int]
    # For the optimizer's step, when no activation lives.
    optimizer_temporaries: int

    @property
    def kept(self) -> int:
        """Returns the bytes of activations in flight."""
        return sum(self.activations.values())


@dataclass(frozen=True)
class RankMemory:
    """Holds the memory of one rank at its peak, in bytes."""

    rank: int
    place: Place
    state: StateBytes
    stage: StageMemory
    reserve: int

    @property
    def temporaries(self) -> int:
        """Returns the most that lives beside the state and the activations, at whichever time is
        worse.
        """
        return max(
            sum(self.stage.temporaries.values()),
            self.stage.optimizer_temporaries - self.stage.kept,
            0,
        )

    @property
    def total(self) -> int:
        """Returns the bytes that the GPU must have."""
        return self.state.total + self.stage.kept + self.temporaries + self.reserve


def passes_in_flight(parallel: ParallelConfig, layout: Layout, stage: int) -> Counter[int]:
    """Returns how many forward passes of each model chunk wait for their backward pass, at the
    worst time.

    The schedules are megatron-core's: 1F1B, and the interleaved one with groups of as many
    microbatches as there are stages.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks == 1:
        return Counter({0: min(layout.num_microbatches, stages - stage)})
    warmup = (stages - stage - 1) * 2 + (chunks - 1) * stages
    passes = min(layout.num_microbatches * chunks, warmup + 1)
    return Counter((index % (stages * chunks)) // stages for index in range(passes))


def stage_memory(
    config: Config, layout: Layout, vocab_size: int, stage: int, numerics: Numerics
) -> StageMemory:
    """Returns the memory of the ranks of one pipeline stage."""
    parallel = config.parallel
    state = stage_state(config, layout, vocab_size, stage, weight_bytes=numerics.bytes)
    passes = passes_in_flight(parallel, layout, stage)
    kept: Counter[str] = Counter()
    kinds: set[bool] = set()
    for chunk in range(parallel.virtual_pipeline):
        for moe, count in layer_kinds(config, stage, chunk).items():
            kinds.add(moe)
            saved = activations.kept_by_layer(config, numerics, moe=moe)
            _add(kept, saved, count * passes[chunk])
    _add(kept, activations.shared_by_layers(config, numerics), 1)
    if stage == 0:
        _add(kept, activations.embedding(config, numerics), passes[0])
    last = stage == parallel.pipeline - 1
    if last:
        # The loss is differentiated right after it is computed: once, whatever is in flight.
        _add(kept, activations.output(config, numerics, vocab_size), 1)
        for moe, depth in prediction_kinds(config, stage).items():
            _add(kept, activations.kept_by_layer(config, numerics, moe=moe), depth)
            _add(kept, activations.prediction(config, numerics, vocab_size), depth)
    optimized = max(
        (buffer.shard(0) if state.sharded else buffer.elements)
        for buffer in (*state.dense, *state.experts)
    )
    return StageMemory(
        stage=stage,
        state=state,
        in_flight=passes.total(),
        activations=dict(kept),
        temporaries=_temporaries(config, vocab_size, kinds, numerics, loss=last),
        # The denominators of torch's AdamW, which works on all parameters of an optimizer at once.
        optimizer_temporaries=4 * optimized,
    )


def _add(total: Counter[str], saved: dict[str, int], times: int) -> None:
    for name, size in saved.items():
        total[name] += times * size


def _temporaries(
    config: Config, vocab_size: int, kinds: set[bool], numerics: Numerics, *, loss: bool
) -> dict[str, int]:
    """Returns the worst of what lives for an operation only: for one layer's backward pass, or for
    the loss's.
    """
    model, tensor, e = config.model, config.parallel.tensor, numerics.bytes
    tokens, hidden = activations.tokens_of_rank(config), model.hidden_size
    gathered = {"gathered sequence": 2 * tokens * hidden * e} if tensor > 1 else {}
    candidates: list[dict[str, int]] = []
    if loss:
        vocabulary = model.padded_vocab_size(vocab_size) // tensor
        # Two fp32 blocks of logits (model/cross_entropy.py), and the gradient of the weight.
        block = 8 * min(tokens * vocabulary, LOSS_BLOCK) if e < 4 else 0
        candidates.append({"loss": block, "weight gradient": vocabulary * hidden * e})
    for moe in kinds:
        whole = activations.whole_layer(config, numerics, moe=moe)
        kept = activations.kept_by_layer(config, numerics, moe=moe)
        recomputed = sum(whole.values()) - sum(kept.values())
        work = {"recomputed layer": max(recomputed, 0)} if recomputed > 0 else {}
        if moe:
            work |= _expert_temporaries(config, numerics)
        else:
            width = model.dense_ffn_hidden_size // tensor
            work["MLP gradients"] = tokens * 4 * width * e
            work["weight gradient"] = 2 * width * hidden * e
        candidates.append(work | gathered)
    return max(candidates, key=lambda work: sum(work.values()))


def _expert_temporaries(config: Config, numerics: Numerics) -> dict[str, int]:
    e, hidden = numerics.bytes, config.model.hidden_size
    rows, width = activations.expert_rows(config, numerics.imbalance), expert_width(config)
    # Gradients of gate, up and their product; the product with the router's weight is fp32.
    gradients = rows * (width * (4 * e + 4) + hidden * e)
    work = {
        "expert gradients": gradients,
        # Gradients go through a tensor of the weight's dtype before they are added in fp32.
        "weight gradient": 2 * local_experts(config) * width * hidden * e,
    }
    if activations.selects_neurons(config, "routed", config.model.expert_ffn_hidden_size):
        # Scores, two masks, and the count of ties in int64; not at the time of the gradients.
        selection = rows * width * (e + 2 + 8)
        work["expert gradients"] = max(gradients, selection)
    return work


def worst_of_stages(
    config: Config, layout: Layout, vocab_size: int, numerics: Numerics, *, reserve: int
) -> list[RankMemory]:
    """Returns the rank of each pipeline stage that needs the most memory."""
    found = []
    for stage in range(config.parallel.pipeline):
        common = stage_memory(config, layout, vocab_size, stage, numerics)
        found.append(_worst_in_stage(common, config.parallel, layout, reserve))
    return found


def _worst_in_stage(
    stage: StageMemory, parallel: ParallelConfig, layout: Layout, reserve: int
) -> RankMemory:
    size = layout.world_size // parallel.pipeline
    # Ranks differ by the padding in their shards alone: by their two data-parallel coordinates.
    distinct: dict[tuple[int, int, int], int] = {}
    for rank in range(stage.stage * size, (stage.stage + 1) * size):
        place = place_of(rank, parallel, layout)
        distinct.setdefault((place.data, place.context, place.expert_data), rank)
    candidates = [
        rank_memory(stage, rank, parallel, layout, reserve=reserve) for rank in distinct.values()
    ]
    return max(candidates, key=lambda memory: memory.total)


def rank_memory(
    stage: StageMemory, rank: int, parallel: ParallelConfig, layout: Layout, *, reserve: int
) -> RankMemory:
    """Returns the memory of one rank of a stage."""
    place = place_of(rank, parallel, layout)
    return RankMemory(rank, place, stage.state.of(place, parallel.context), stage, reserve)
