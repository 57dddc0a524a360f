"""Lists the weights of one layer's attention, and the sizes that its counts are made of.

GQA projects queries, keys and values at once. MLA (multi-latent attention) projects keys and values
down to a latent and up again, queries likewise or at once; a part of each query and one key for all
heads carry the position. Its down projections are whole on every tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from mone_megatron.config.schema import ModelConfig

# Heads with a sink are as wide as the next multiple of this (model/attention.py).
SINK_STEP = 8


@dataclass(frozen=True)
class Projection:
    """Describes one matrix of attention."""

    name: str
    inputs: int
    outputs: int
    # Over the tensor-parallel ranks, by heads; else every rank has all of it.
    split: bool = True
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Returns the number of weights and biases, over all tensor-parallel ranks."""
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class AttentionNorm:
    """Describes one RMSNorm inside attention."""

    name: str
    width: int
    split: bool = False


def head_dim_of(model: ModelConfig) -> int:
    """Returns the size of one query or key head."""
    if model.attention == "mla":
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
    return model.head_dim or model.hidden_size // model.num_attention_heads


def value_dim_of(model: ModelConfig) -> int:
    """Returns the size of one value head."""
    return model.mla.v_head_dim if model.attention == "mla" else head_dim_of(model)


def projections(model: ModelConfig) -> tuple[Projection, ...]:
    """Returns the matrices of one layer's attention, in the order of megatron-core's modules."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    back = Projection("linear_proj", heads * value_dim_of(model), hidden)
    queries = heads * head_dim_of(model)
    if model.attention == "gqa":
        keys = model.num_query_groups * head_dim_of(model)
        return back, Projection("linear_qkv", hidden, queries + 2 * keys, bias=model.qkv_bias)
    mla = model.mla
    latent = mla.kv_lora_rank
    keys_and_values = (
        Projection("linear_kv_down_proj", hidden, latent + mla.qk_rope_head_dim, split=False),
        Projection("linear_kv_up_proj", latent, heads * (mla.qk_nope_head_dim + mla.v_head_dim)),
    )
    if mla.q_lora_rank == 0:
        return back, Projection("linear_q_proj", hidden, queries), *keys_and_values
    return (
        back,
        Projection("linear_q_down_proj", hidden, mla.q_lora_rank, split=False),
        Projection("linear_q_up_proj", mla.q_lora_rank, queries),
        *keys_and_values,
    )


def norms(model: ModelConfig) -> tuple[AttentionNorm, ...]:
    """Returns the RMSNorms inside one layer's attention, in the order of their modules."""
    if model.attention == "mla":
        latents = [("q_layernorm", model.mla.q_lora_rank), ("kv_layernorm", model.mla.kv_lora_rank)]
        return tuple(AttentionNorm(name, width) for name, width in latents if width)
    if not model.qk_norm:
        return ()
    # One head's weights are every rank's; those of all heads are split like the heads.
    split = model.qk_norm_scope == "all_heads"
    heads = {"q_layernorm": model.num_attention_heads, "k_layernorm": model.num_query_groups}
    return tuple(
        AttentionNorm(name, head_dim_of(model) * (count if split else 1), split)
        for name, count in heads.items()
    )


def projection_flops(model: ModelConfig) -> int:
    """Returns the forward operations of a token in the matrices of one layer's attention."""
    return sum(2 * matrix.inputs * matrix.outputs for matrix in projections(model))


def sinks(model: ModelConfig) -> int:
    """Returns the number of learnt sinks of one layer's attention, over all ranks."""
    return model.num_attention_heads if model.attention_sink == "learnable" else 0


def windowed_layers(model: ModelConfig) -> int:
    """Returns how many layers attend within the window."""
    if not model.attention_window:
        return 0
    every = model.full_attention_every
    return model.num_layers - (model.num_layers // every if every else 0)


def score_flops(model: ModelConfig, seq_length: int) -> int:
    """Returns the forward operations of a token in scores and weighted values of all layers: two
    products over the keys that it sees, on average (s + 1) / 2 of a sequence of s, and within a
    window of w tokens w (2s - w + 1) / 2s.
    """
    heads = model.num_attention_heads
    each = heads * (head_dim_of(model) + value_dim_of(model))
    near, window = windowed_layers(model), min(model.attention_window, seq_length)
    seen = window * (2 * seq_length - window + 1)
    whole = (model.num_layers - near) * each * (seq_length + 1)
    return whole + (near * each * seen // seq_length if near else 0)
