"""Maps our tensors to theirs and back: a rule for each tensor (or expert), in layers' order.

A rule is exact: its two directions are slices, concatenations and transpositions, so a round trip
is bitwise. The only numbers that one side has and the other has not are the padding rows of our
embedding and output layer; they are zeros.

Shape suffixes: H hidden size, F neurons of one expert, E experts, G key/value groups, R query heads
of a group, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mone_megatron.config.schema import ModelConfig, MoNEConfig
from mone_megatron.hf.architectures import Architecture, ExpertNames
from mone_megatron.kernels.product_keys import ProductKeySizes
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import STATE_PREFIX, count_kept
from mone_megatron.methods.rules import RULES

Shape = tuple[int, ...]


def _only(tensors: tuple[Tensor, ...]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _tuple(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True)
class Rule:
    """Says that one of our tensors, or a row of it, holds the same numbers as some of theirs."""

    # Our tensor, its shape, and which row of its first axis this is about; None for all of it.
    ours: str
    shape: Shape
    # Their tensors and their shapes.
    theirs: tuple[tuple[str, Shape], ...]
    row: int | None = None
    to_theirs: Callable[[Tensor], tuple[Tensor, ...]] = _tuple
    to_ours: Callable[[tuple[Tensor, ...]], Tensor] = _only

    @property
    def our_shape(self) -> Shape:
        """Returns the shape of what the two functions take and give: the row's, if it is one."""
        return self.shape if self.row is None else self.shape[1:]

    def export(self, ours: Tensor) -> list[tuple[str, Tensor]]:
        """Returns their tensors with their names, contiguous, made of our tensor (or row)."""
        assert ours.shape == self.our_shape, (self.ours, ours.shape, self.our_shape)
        made = [tensor.contiguous() for tensor in self.to_theirs(ours)]
        for tensor, (name, shape) in zip(made, self.theirs, strict=True):
            assert tensor.shape == shape, (name, tensor.shape, shape)
        return [(name, tensor) for tensor, (name, _) in zip(made, self.theirs, strict=True)]

    def take(self, theirs: tuple[Tensor, ...]) -> Tensor:
        """Returns our tensor (or row), contiguous, made of theirs."""
        ours = self.to_ours(theirs).contiguous()
        assert ours.shape == self.our_shape, (self.ours, ours.shape, self.our_shape)
        return ours


def rules(
    model: ModelConfig,
    vocab_size: int,
    architecture: Architecture,
    experts: ExpertNames | None = None,
    mone: MoNEConfig | None = None,
) -> Iterator[Rule]:
    """Yields the rules of every tensor of a model, in the order of its layers.

    Args:
        model: ours.
        vocab_size: true size, of the tokenizer.
        architecture: theirs.
        experts: how their experts are stored, when not as the architecture's are.
        mone: the method's settings, whose rule may have a state; None for none.
    """
    embedding = "embedding.word_embeddings.weight"
    yield _vocabulary(model, vocab_size, embedding, "model.embed_tokens.weight")
    for layer in range(model.num_layers):
        yield from _layer(model, layer, architecture, experts or architecture.experts)
        if mone is not None and mone.enabled:
            yield from _rule_state(model, mone, layer)
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,))
    if not model.tie_embeddings:
        yield _vocabulary(model, vocab_size, "output_layer.weight", "lm_head.weight")


def _rule_state(model: ModelConfig, mone: MoNEConfig, layer: int) -> Iterator[Rule]:
    """Yields the rules of a selection rule's state in a layer: a number for each expert."""
    block = f"layers.{layer}.mlp."
    # Name of the module in ours and theirs, neurons and experts.
    places = {
        "routed": ("experts.", "experts.", model.expert_ffn_hidden_size, model.num_experts),
        "shared": (
            "shared_experts.",
            "shared_expert.",
            model.shared_expert_ffn_hidden_size,
            1,
        ),
    }
    if model.num_experts == 0 or layer < model.first_dense_layers:
        places = {"dense": ("", "", model.dense_ffn_hidden_size, 1)}
    for target, (ours, theirs, neurons, experts) in places.items():
        if target not in mone.apply_to or count_kept(mone.keep_ratio, neurons) >= neurons:
            continue
        for name in RULES[mone.rule].state:
            yield _same(
                f"decoder.{block}{ours}neuron_gate.selector.{STATE_PREFIX}{name}",
                f"model.{block}{theirs}{STATE_PREFIX}{name}",
                (experts,),
            )


def _same(ours: str, theirs: str, shape: Shape) -> Rule:
    return Rule(ours, shape, ((theirs, shape),))


def _vocabulary(model: ModelConfig, vocab_size: int, ours: str, theirs: str) -> Rule:
    rows, hidden = model.padded_vocab_size(vocab_size), model.hidden_size

    def pad(tensors: tuple[Tensor, ...]) -> Tensor:
        (true_VH,) = tensors
        return torch.cat([true_VH, true_VH.new_zeros(rows - vocab_size, hidden)])

    return Rule(
        ours,
        (rows, hidden),
        ((theirs, (vocab_size, hidden)),),
        to_theirs=lambda padded_VH: (padded_VH[:vocab_size],),
        to_ours=pad,
    )


def _layer(
    model: ModelConfig, layer: int, architecture: Architecture, experts: ExpertNames
) -> Iterator[Rule]:
    ours, theirs, hidden = f"decoder.layers.{layer}.", f"model.layers.{layer}.", model.hidden_size
    yield _same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,))
    attention = _latent_attention if model.attention == "mla" else _grouped_attention
    yield from attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
    yield _same(
        f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)
    )
    if model.experts == "product_key":
        sizes = ProductKeySizes(**asdict(model.product_key))
        for name, shape in sizes.weights(hidden).items():
            yield _same(f"{ours}mlp.{name}", f"{theirs}mlp.{name}", shape)
        return
    if model.num_experts == 0 or layer < model.first_dense_layers:
        yield from _mlp(model, model.dense_ffn_hidden_size, f"{ours}mlp.", f"{theirs}mlp.")
        return
    yield from _moe(model, f"{ours}mlp.", theirs, architecture, experts)


def _grouped_attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of grouped-query attention.

    Ours interleaves groups: R query heads, a key head and a value head of each group.
    """
    hidden, groups = model.hidden_size, model.num_query_groups
    head = model.head_dim or hidden // model.num_attention_heads
    per_group = model.num_attention_heads // groups
    rows = (per_group * groups * head, groups * head, groups * head)

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        grouped = qkv.unflatten(0, (groups, per_group + 2, head))
        parts = grouped.split([per_group, 1, 1], dim=1)
        return tuple(part.flatten(0, 2) for part in parts)

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        grouped = [part.unflatten(0, (groups, -1, head)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)

    for kind, tail in (("weight", (hidden,)), *((("bias", ()),) if model.qkv_bias else ())):
        yield Rule(
            f"{ours}linear_qkv.{kind}",
            (sum(rows), *tail),
            tuple(
                (f"{theirs}{name}_proj.{kind}", (count, *tail))
                for name, count in zip("qkv", rows, strict=True)
            ),
            to_theirs=split,
            to_ours=join,
        )
    if model.qk_norm:
        whole = model.qk_norm_scope == "all_heads"
        for name, count in zip("qk", rows, strict=False):
            shape = (count if whole else head,)
            yield _same(f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight", shape)
    yield _same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (hidden, rows[0]))


def _latent_attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of multi-latent attention: the same matrices, with other names."""
    mla, hidden, heads = model.mla, model.hidden_size, model.num_attention_heads
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    latent = mla.kv_lora_rank
    same: list[tuple[str, str, Shape]] = []
    if mla.q_lora_rank:
        same += [
            ("linear_q_down_proj", "q_a_proj", (mla.q_lora_rank, hidden)),
            ("q_layernorm", "q_a_layernorm", (mla.q_lora_rank,)),
            ("linear_q_up_proj", "q_b_proj", (queries, mla.q_lora_rank)),
        ]
    else:
        same += [("linear_q_proj", "q_proj", (queries, hidden))]
    expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    same += [
        ("linear_kv_down_proj", "kv_a_proj_with_mqa", (latent + mla.qk_rope_head_dim, hidden)),
        ("kv_layernorm", "kv_a_layernorm", (latent,)),
        ("linear_kv_up_proj", "kv_b_proj", (expanded, latent)),
        ("linear_proj", "o_proj", (hidden, heads * mla.v_head_dim)),
    ]
    for our_name, their_name, shape in same:
        yield _same(f"{ours}{our_name}.weight", f"{theirs}{their_name}.weight", shape)


def _mlp(model: ModelConfig, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of a dense gated MLP; ours holds gate and up in one matrix."""
    hidden = model.hidden_size
    yield Rule(
        f"{ours}linear_fc1.weight",
        (2 * width, hidden),
        tuple((f"{theirs}{name}_proj.weight", (width, hidden)) for name in ("gate", "up")),
        to_theirs=lambda gate_up: gate_up.chunk(2),
        to_ours=torch.cat,
    )
    yield _same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, width))


def _moe(
    model: ModelConfig, ours: str, theirs: str, architecture: Architecture, experts: ExpertNames
) -> Iterator[Rule]:
    hidden, count = model.hidden_size, model.num_experts
    block = f"{theirs}{experts.block}."
    if experts.kind != "copies":
        for name, weight in ROUTERS[model.router.kind].weights(model.router_settings).items():
            yield _same(f"{ours}router.{name}", f"{block}gate.{name}", weight.shape)
    if model.router.expert_bias:
        name = "gate.e_score_correction_bias"
        yield _same(f"{ours}router.expert_bias", f"{block}{name}", (count,))
    kinds = {"split": _split_experts, "fused": _fused_experts, "copies": _copied_experts}
    yield from kinds[experts.kind](model, f"{ours}experts.", f"{block}experts", experts)
    if width := model.shared_expert_ffn_hidden_size:
        shared = f"{theirs}mlp.{architecture.shared}"
        yield from _mlp(model, width, f"{ours}shared_experts.", f"{shared}.")
        if model.shared_expert_gate:
            gate = f"{ours}shared_experts.gate_weight"
            yield _same(gate, f"{shared}_gate.weight", (1, hidden))


def _fused_experts(
    model: ModelConfig, ours: str, theirs: str, names: ExpertNames
) -> Iterator[Rule]:
    """Yields the rules of experts in two tensors on both sides; ours is neuron-major in both.

    Weights of a gate that is not the usual one have our names there.
    """
    experts, width, hidden = model.num_experts, model.expert_ffn_hidden_size, model.hidden_size
    if model.gate == "full":
        yield Rule(
            f"{ours}gate_up_weight",
            (experts, 2, width, hidden),
            ((f"{theirs}.gate_up_proj", (experts, 2 * width, hidden)),),
            to_theirs=lambda gate_up_E2FH: (gate_up_E2FH.flatten(1, 2),),
            to_ours=lambda tensors: _only(tensors).unflatten(1, (2, width)),
        )
    else:
        for name, weight in GATES[model.gate].weights(model.gate_size).items():
            yield _same(f"{ours}{name}", f"{theirs}.{name}", (experts, *weight.shape))
    yield Rule(
        f"{ours}down_weight",
        (experts, width, hidden),
        ((f"{theirs}.down_proj", (experts, hidden, width)),),
        to_theirs=lambda down_EFH: (down_EFH.transpose(1, 2),),
        to_ours=lambda tensors: _only(tensors).transpose(1, 2),
    )


def _split_experts(
    model: ModelConfig, ours: str, theirs: str, names: ExpertNames
) -> Iterator[Rule]:
    """Yields the rules of experts that are three matrices each on their side."""
    prefixes = [f"{theirs}.{expert}" for expert in range(model.num_experts)]
    yield from _expert_matrices(model, ours, prefixes, names)


def _copied_experts(
    model: ModelConfig, ours: str, theirs: str, names: ExpertNames
) -> Iterator[Rule]:
    """Yields the rules that make each of our experts a copy of a dense MLP. One way only."""
    block = theirs.removesuffix(".experts")
    yield from _expert_matrices(model, ours, [block] * model.num_experts, names)


def _expert_matrices(
    model: ModelConfig, ours: str, prefixes: list[str], names: ExpertNames
) -> Iterator[Rule]:
    experts, width, hidden = model.num_experts, model.expert_ffn_hidden_size, model.hidden_size
    for expert, prefix in enumerate(prefixes):
        gate, up = (f"{prefix}.{name}.weight" for name in names.projections[:2])
        yield Rule(
            f"{ours}gate_up_weight",
            (experts, 2, width, hidden),
            ((gate, (width, hidden)), (up, (width, hidden))),
            row=expert,
            to_theirs=lambda gate_up_2FH: gate_up_2FH.unbind(),
            to_ours=torch.stack,
        )
    for expert, prefix in enumerate(prefixes):
        down = f"{prefix}.{names.projections[2]}.weight"
        yield Rule(
            f"{ours}down_weight",
            (experts, width, hidden),
            ((down, (hidden, width)),),
            row=expert,
            to_theirs=lambda down_FH: (down_FH.T,),
            to_ours=lambda tensors: _only(tensors).T,
        )
