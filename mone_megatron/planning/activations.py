"""Counts the bytes that one forward pass of a microbatch keeps for its backward pass, by tensor.

Each entry is a tensor that autograd saves (of several views of one storage, the storage), named
after what it is. Two sets of kernels differ: on CPU SwiGLU with selection is one function in fp32
only, where norms keep their input alone and all layers share the cosines and sines of RoPE, and in
bf16 RMSNorm keeps fp32 copies; on CUDA selection and gated unit are Triton's
(:mod:`mone_megatron.kernels.fused`), and RMSNorm is torch's fused one. Of a run in fp32 on a CPU
the steps are meant that count layers (``logging.layer_interval``): in the others experts keep less
(:mod:`mone_megatron.kernels.experts_cpu`).

Symbols: n tokens of a microbatch on this context-parallel rank, s of them on a rank where they are
split over the tensor-parallel ranks, e bytes of an activation, h hidden size, T rows that the
experts of a rank get, f neurons of an expert on a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mone_megatron.config.schema import Config, MoNEConfig
from mone_megatron.kernels.attention_blocks import keeps_weights, weights_of_head
from mone_megatron.kernels.few_largest import MOST_LARGEST
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import count_kept
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.planning.attention import (
    SINK_STEP,
    head_dim_of,
    value_dim_of,
    windowed_layers,
)
from mone_megatron.planning.shards import expert_width, local_experts

Kernels = Literal["cpu", "cuda"]
Saved = dict[str, int]


@dataclass(frozen=True)
class Numerics:
    """Says which kernels run, in which dtype, and how uneven the load of experts is."""

    kernels: Kernels
    # Of one weight or activation: 2 for bf16, 4 for fp32.
    bytes: int
    # The rows of the rank whose experts have the most to do, over the mean.
    imbalance: float = 1.0
    # Attention is ours (model/attention.py), and not Transformer Engine's.
    own_attention: bool = True


def tokens_of_rank(config: Config) -> int:
    """Returns n: the tokens of a microbatch on one context-parallel rank."""
    return config.train.micro_batch_size * config.train.seq_length // config.parallel.context


def expert_rows(config: Config, imbalance: float = 1.0) -> int:
    """Returns T: the rows that the experts of one rank get from a microbatch, rounded up."""
    rows = split_tokens(config) * config.model.experts_per_token * config.parallel.expert_tensor
    return math.ceil(rows * imbalance)


def kept_by_layer(config: Config, numerics: Numerics, *, moe: bool) -> Saved:
    """Returns the bytes by tensor that a layer keeps for its backward pass under
    ``train.recompute``.
    """
    if config.train.recompute == "full":
        hidden = config.model.hidden_size
        return {"layer input": split_tokens(config) * hidden * numerics.bytes}
    saved = whole_layer(config, numerics, moe=moe)
    if config.train.recompute == "none":
        return saved
    # Selective: attention and the MoE layer (of a dense model: the MLP) run again from their
    # inputs. The output of attention stays, since the projection after it keeps it.
    recomputed = {"attention softmax", "attention padding", "attention mask"}
    if moe or config.model.num_experts == 0:
        recomputed |= {name for name in saved if name.startswith(("router", "MLP", "experts"))}
        recomputed |= {"MoE dispatch", "shared expert", "MoNE masks", "neuron balance"}
    return {name: size for name, size in saved.items() if name not in recomputed}


def whole_layer(config: Config, numerics: Numerics, *, moe: bool) -> Saved:
    """Returns the bytes by tensor that a layer keeps for its backward pass if all of it is kept."""
    model, tensor, e = config.model, config.parallel.tensor, numerics.bytes
    n, s, hidden = tokens_of_rank(config), split_tokens(config), model.hidden_size
    saved: Saved = {
        "norms": 2 * _norm(numerics, s, hidden, heads=1, copied=True),
        # Inputs of the QKV projection and of the MLP.
        "norm outputs": 2 * s * hidden * e,
        **_attention(config, numerics, n, tensor),
    }
    if model.hidden_dropout:
        saved["dropout masks"] = 2 * s * hidden
    if moe:
        return saved | _moe(config, numerics, n, s)
    if model.experts == "product_key":
        return saved | {"MLP": n * _product_key(config, numerics)}
    selecting = selects_neurons(config, "dense", model.dense_ffn_hidden_size)
    mlp = _gated_mlp(
        config, numerics, n, model.dense_ffn_hidden_size // tensor, selecting=selecting
    )
    saved |= {"MLP": mlp}
    if selecting:
        width = model.dense_ffn_hidden_size // tensor
        saved |= {"MoNE masks": n * _mask(config, numerics, width)}
        saved |= _balance(config, numerics, n, width, segments=1, split=tensor > 1)
    return saved


def _product_key(config: Config, numerics: Numerics) -> int:
    """Returns the bytes of a token in a layer of single-neuron experts."""
    model, keys, e = config.model, config.model.product_key, numerics.bytes
    queries = keys.heads * 2 * keys.key_dim
    chosen = keys.heads * keys.experts_per_head
    each_side = 2 * keys.heads * min(keys.experts_per_head, keys.keys)
    # Queries before and after the norm in fp32, its scales; where the best of each side and of
    # their sums are (int64), and the rows of both tables.
    found = 8 * queries + 4 * 2 * keys.heads + 8 * (each_side + chosen)
    # The softmax in fp32 and as it is used, the numbers of experts, and four values of each one's
    # neuron.
    weighed = chosen * (4 + (0 if e == 4 else e) + 8 + 3 * e)
    return found + weighed + 2 * chosen * model.hidden_size * e


def split_tokens(config: Config) -> int:
    """Returns s: the tokens of a tensor-parallel rank under sequence parallelism."""
    return tokens_of_rank(config) // config.parallel.tensor


def _one_function(config: Config, numerics: Numerics) -> bool:
    """Returns whether the gated unit with selection is one autograd function (``kernels.ops``)."""
    activation = ACTIVATIONS[config.model.activation]
    if numerics.kernels == "cuda":
        return activation.fused is not None
    return activation.fused_on_cpu and numerics.bytes == 4


def _mask(config: Config, numerics: Numerics, width: int) -> int:
    """Returns the bytes per row of the mask of ``width`` neurons: bits, or on CPU in full mode
    whole bytes.
    """
    if numerics.kernels == "cuda" or config.mone.memory == "packed":
        return -(-width // 8)
    return width


def _norm(numerics: Numerics, tokens: int, width: int, *, heads: int, copied: bool) -> int:
    """Returns the bytes that RMSNorm of ``width`` values in ``heads`` rows keeps: its input, the
    scales and, on CPU in bf16, both the input and x / rms in fp32.

    ``copied`` says that the input is a tensor of its own and not part of one that is kept anyway.
    """
    scales = 4 * heads
    if numerics.kernels == "cuda":
        return tokens * (scales + width * numerics.bytes)
    if numerics.bytes == 4:
        return tokens * (scales + (4 * width if copied else 0))
    return tokens * (scales + 8 * width)


def _attention(config: Config, numerics: Numerics, n: int, tensor: int) -> Saved:
    if config.model.attention == "mla":
        return _latent_attention(config, numerics, n, tensor)
    if _makes_heads(config, numerics):
        return _attention_of_projections(config, numerics, n)
    return _attention_of_heads(config, numerics, n, tensor)


def _makes_heads(config: Config, numerics: Numerics) -> bool:
    """Returns whether layers without a window make their queries and keys where they use them
    (:func:`mone_megatron.kernels.attention_cpu.attention_of_projections`).
    """
    model = config.model
    return (
        keeps_attention_weights(config, numerics)
        and config.parallel.tensor == 1
        and config.train.recompute != "selective"
        and model.qk_norm
        and model.qk_norm_scope == "head"
        and model.rope_scaling.type == "none"
    )


def _attention_of_projections(config: Config, numerics: Numerics, n: int) -> Saved:
    """Returns what layers keep that make their queries and keys twice: projections, scales of
    norms, weights and the output. Those with a window keep the usual, and each gets its share.
    """
    model, e = config.model, numerics.bytes
    heads, groups = model.num_attention_heads, model.num_query_groups
    head_dim = head_dim_of(model)
    usual = _attention_of_heads(config, numerics, n, 1)
    saved = usual | {
        "attention operands": n * heads * head_dim * e,
        "query and key norms": n * (heads + groups) * 4,
    }
    near = windowed_layers(model) / model.num_layers
    # The weights, and the masks of layers with a window, are shares of all layers already.
    return {name: round(near * usual[name] + (1 - near) * size) for name, size in saved.items()}


def _attention_of_heads(config: Config, numerics: Numerics, n: int, tensor: int) -> Saved:
    model, e = config.model, numerics.bytes
    head_dim = head_dim_of(model)
    heads, groups = model.num_attention_heads // tensor, model.num_query_groups // tensor
    queries, keys = heads * head_dim, groups * head_dim
    own = numerics.own_attention
    saved: Saved = {
        # The value is a part of the projection's output, which lives with it.
        "attention QKV": n * (queries + 2 * keys) * e,
        # Queries and keys after RoPE, the output; then the log-sum-exp of each row.
        "attention operands": n * (2 * queries + keys) * e,
        "attention softmax": _softmax(config, numerics, n, heads),
    }
    if not _rotates_leanly(config, numerics):
        # Cosines and sines, of queries and of keys; the same for all sequences.
        saved["RoPE"] = 4 * (config.train.seq_length // config.parallel.context) * head_dim * e
    if model.qk_norm:
        saved["query and key norms"] = n * _query_and_key_norms(config, numerics, heads, groups)
    if own and (config.parallel.context > 1 or model.attention_sink != "none"):
        saved |= _copied_operands(config, numerics, saved, n, heads=heads, groups=groups)
    if own:
        saved |= _mask_of_attention(config, numerics)
    return saved


def keeps_attention_weights(config: Config, numerics: Numerics) -> bool:
    """Returns whether layers without a window are :mod:`mone_megatron.kernels.attention_cpu`."""
    model = config.model
    return (
        numerics.kernels == "cpu"
        and numerics.bytes == 4
        and numerics.own_attention
        and keeps_weights(config.train.seq_length)
        and head_dim_of(model) == value_dim_of(model)
        and not model.attention_dropout
        and model.attention_sink == "none"
        and not config.data.reset_attention
        and config.parallel.context == 1
        and windowed_layers(model) < model.num_layers
    )


def _softmax(config: Config, numerics: Numerics, n: int, heads: int) -> int:
    """Returns the bytes of the log-sum-exp of each row, or of the weights where those are kept."""
    rows = n * heads * 4
    if not keeps_attention_weights(config, numerics):
        return rows
    sequences, layers = config.train.micro_batch_size, config.model.num_layers
    weights = sequences * heads * weights_of_head(config.train.seq_length) * 4
    near = windowed_layers(config.model)
    return round((near * rows + (layers - near) * weights) / layers)


def _rotates_leanly(config: Config, numerics: Numerics) -> bool:
    """Returns whether RoPE is :mod:`mone_megatron.kernels.rotary_cpu`."""
    lean = numerics.kernels == "cpu" and numerics.bytes == 4
    return lean and config.model.attention != "mla"


def shared_by_layers(config: Config, numerics: Numerics) -> Saved:
    """Returns the bytes by tensor that a stage keeps once for all its layers and microbatches."""
    if config.train.recompute == "full" or not _rotates_leanly(config, numerics):
        return {}
    length = config.train.seq_length // config.parallel.context
    # Cosines and sines.
    return {"RoPE": 2 * length * head_dim_of(config.model) * numerics.bytes}


def _latent_attention(config: Config, numerics: Numerics, n: int, tensor: int) -> Saved:
    mla, e, s = config.model.mla, numerics.bytes, split_tokens(config)
    heads = config.model.num_attention_heads // tensor
    queries, values = heads * head_dim_of(config.model), heads * value_dim_of(config.model)
    # The norm of the latent keeps the whole output of the projection that it is a part of, unless
    # it keeps a copy in fp32.
    part = 0 if numerics.kernels == "cpu" and e == 2 else e * mla.qk_rope_head_dim
    latents = [(mla.kv_lora_rank, part)] + ([(mla.q_lora_rank, 0)] if mla.q_lora_rank else [])
    saved: Saved = {
        "latent norms": s
        * sum(_norm(numerics, 1, width, heads=1, copied=True) + more for width, more in latents),
        # Inputs of the up projections.
        "latents": s * sum(width for width, _ in latents) * e,
        "attention operands": n * (2 * queries + 2 * values) * e,
        "attention softmax": _softmax(config, numerics, n, heads),
        "RoPE": 4 * (config.train.seq_length // config.parallel.context) * mla.qk_rope_head_dim * e,
    }
    if numerics.own_attention:
        saved |= _mask_of_attention(config, numerics)
    if queries != values:
        # Kept instead: all four as wide as the wider of the two, and the output cut back.
        wide = 4 * max(queries, values) + values
        saved["attention padding"] = n * (wide - 2 * queries - 2 * values) * e
    return saved


def _copied_operands(
    config: Config, numerics: Numerics, saved: Saved, n: int, *, heads: int, groups: int
) -> Saved:
    """Returns the entries of :func:`_attention` that change where keys and values are gathered
    over context-parallel ranks, or get a sink: one more query, key and element of a head.
    """
    model, e, contexts = config.model, numerics.bytes, config.parallel.context
    head_dim, sequences = head_dim_of(model), config.train.micro_batch_size
    before = saved["attention QKV"] + saved["attention operands"]
    # The value is a copy: the projection's output lives for the norm of keys alone.
    normed = model.qk_norm and not (numerics.kernels == "cpu" and e == 2)
    after = saved["attention QKV"] if normed else 0
    if model.attention_sink == "none":
        after += n * (2 * heads + 2 * contexts * groups) * head_dim * e
        return {"attention padding": after - before}
    width = -(-(head_dim + 1) // SINK_STEP) * SINK_STEP
    rows, keys = n + sequences, n * contexts + sequences
    # Queries, the output (once more without the sink's row), keys and values.
    after += (2 * rows * heads * width + n * heads * head_dim + 2 * keys * groups * width) * e
    return {"attention padding": after - before, "attention softmax": rows * heads * 4}


def _mask_of_attention(config: Config, numerics: Numerics) -> Saved:
    """Returns which keys each query sees, as the kernel keeps it: a number for each pair."""
    model, parallel = config.model, config.parallel
    apart = config.data.reset_attention
    if not (apart or model.attention_window or parallel.context > 1):
        return {}
    sink = model.attention_sink != "none"
    keys = config.train.seq_length + sink
    queries = config.train.seq_length // parallel.context + sink
    masks = config.train.micro_batch_size if apart else 1
    # Layers that see all need none, where nothing else does.
    share = 1.0
    if not apart and parallel.context == 1:
        share = windowed_layers(model) / model.num_layers
    return {"attention mask": round(share * masks * queries * keys * numerics.bytes)}


def _query_and_key_norms(config: Config, numerics: Numerics, heads: int, groups: int) -> int:
    """Returns the bytes per token of the norms of ``heads`` queries and ``groups`` keys."""
    head_dim, e = head_dim_of(config.model), numerics.bytes
    # Queries of several heads a group are copied out of the projection's output.
    copied = heads > groups
    if config.model.qk_norm_scope == "head":
        return _norm(numerics, 1, heads * head_dim, heads=heads, copied=copied) + _norm(
            numerics, 1, groups * head_dim, heads=groups, copied=False
        )
    if config.parallel.tensor == 1:
        # One row of all heads, which a copy puts side by side.
        return sum(
            _norm(numerics, 1, rows * head_dim, heads=1, copied=rows > 1)
            for rows in (heads, groups)
        )
    # The sum of squares is added up over ranks in between: plain operations, in fp32.
    width = (heads + groups) * head_dim
    upcast = 4 * width if e == 2 else 4 * heads * head_dim * copied
    return 2 * 4 + upcast + e * width


def _gated_mlp(
    config: Config, numerics: Numerics, tokens: int, width: int, *, selecting: bool
) -> int:
    """Returns the bytes that an MLP keeps from its first projection on, whether it is
    megatron-core's or one that selects neurons.
    """
    if selecting:
        return tokens * _selected_glu(config, numerics, width) * numerics.bytes
    if numerics.kernels == "cuda" and ACTIVATIONS[config.model.activation].fused_by_megatron:
        # Gate and up, and the input of the last projection.
        return tokens * 3 * width * numerics.bytes
    # The activation, a copy of the up part and the input of the last projection; and gate and up,
    # where the activation keeps the gate.
    keeps_gate = ACTIVATIONS[config.model.activation].keeps_input
    kept = (5 if keeps_gate else 3) + _intermediates(config)
    return tokens * kept * width * numerics.bytes


def _selected_glu(
    config: Config, numerics: Numerics, width: int, *, selecting: bool = True, scaled: bool = False
) -> int:
    """Returns the values that a row keeps: gate and up, the activation and the last projection's
    input, of each neuron.

    As one function on CUDA the unit keeps the gate and computes the activation again. Where it is
    not one, the product that the router's weight scales is kept, too, if there is one (``scaled``).
    """
    if selecting and config.mone.memory == "packed":
        # Of each rank of several that share the neurons, its part of what is kept.
        return 2 * most_kept(config.mone, width)
    if _one_function(config, numerics):
        return width * (3 if numerics.kernels == "cuda" else 4)
    return width * (4 + _intermediates(config) + scaled)


def gate_latent(config: Config) -> int:
    """Returns the values of a row that stand between it and its gate projections (``model.gate``).

    Ranks that share an expert have all of them.
    """
    return GATES[config.model.gate].latent(config.model.gate_size)


def most_kept(mone: MoNEConfig, width: int) -> int:
    """Returns the largest number of neurons that a row of ``width`` neurons keeps."""
    rule = RULES[mone.rule]
    return rule.most_kept(rule.budget(mone.keep_ratio, width, mone.rule_options))


def _intermediates(config: Config) -> int:
    """Returns what the activation keeps beside its input and its result, in values per neuron."""
    return ACTIVATIONS[config.model.activation].intermediates


def _moe(config: Config, numerics: Numerics, n: int, s: int) -> Saved:
    model, e, tensor = config.model, numerics.bytes, config.parallel.tensor
    rows = expert_rows(config, numerics.imbalance)
    width, experts = expert_width(config), model.num_experts
    selecting = selects_neurons(config, "routed", model.expert_ffn_hidden_size)
    kept = _selected_glu(config, numerics, width, selecting=selecting, scaled=True)
    saved: Saved = {
        "router": s * _router(config, numerics),
        "MoE dispatch": s * experts * 5 + _dispatch(config, numerics, s, rows),
        "experts' gate, up and products": rows * ((kept + gate_latent(config)) * e + 4),
    }
    if selecting:
        saved["MoNE masks"] = rows * _mask(config, numerics, width)
        segments = local_experts(config) * _microbatches_that_meet(config)
        split = config.parallel.expert_tensor > 1
        saved |= _balance(config, numerics, rows, width, segments=segments, split=split)
    if SPARSITY_LOSSES[model.sparsity_loss].function is not None:
        # Hidden values are kept before they are scaled, too, and which segment a row is of.
        packed = selecting and config.mone.memory == "packed"
        segments = local_experts(config) * _microbatches_that_meet(config)
        sums = 4 * segments if model.sparsity_coeff else 0
        saved["sparsity loss"] = rows * ((0 if packed else width * e) + sums)
    if model.shared_expert_ffn_hidden_size:
        shared = model.shared_expert_ffn_hidden_size
        selecting_shared = selects_neurons(config, "shared", shared)
        size = _gated_mlp(config, numerics, n, shared // tensor, selecting=selecting_shared)
        if model.shared_expert_gate:
            size += s * (model.hidden_size * e + 2 * e)
        if selecting_shared:
            size += n * _mask(config, numerics, shared // tensor)
            balance = _balance(config, numerics, n, shared // tensor, segments=1, split=tensor > 1)
            size += sum(balance.values())
        saved["shared expert"] = size
    return saved


def _routes_in_one_pass(config: Config, numerics: Numerics) -> bool:
    """Returns whether routing is one function of autograd
    (:mod:`mone_megatron.kernels.router_cpu`).
    """
    router = config.model.router
    return (
        numerics.kernels == "cpu"
        and ROUTERS[router.kind].stock
        and (router.dtype == "fp32" or (router.dtype == "model" and numerics.bytes == 4))
        and router.score_function == "softmax"
        and list(router.balance) in ([], ["none"], ["aux_loss"])
        and not router.expert_bias
        and not router.group_topk
        and config.model.experts_per_token <= MOST_LARGEST
    )


def _router(config: Config, numerics: Numerics) -> int:
    """Returns the bytes per token of the router's logits, probabilities and choices."""
    model, router = config.model, config.model.router
    experts, chosen = model.num_experts, model.experts_per_token
    if _routes_in_one_pass(config, numerics):
        # Scores, weights, their log-sum-exp, and which are chosen.
        return 4 * experts + 4 * experts + 4 + experts
    wide = 8 if router.dtype == "fp64" else 4
    size = 8 * chosen  # indices
    size += wide * ROUTERS[router.kind].latent(model.router_settings)
    size += wide * (experts if router.pre_softmax or router.score_function == "sigmoid" else chosen)
    if router.z_loss_coeff:
        size += wide * (experts + 1)
    if any(router.balance_coeff):
        # All scores once more, and the indices of the best.
        size += 4 * experts + 8 * chosen
    return size


def _dispatch(config: Config, numerics: Numerics, s: int, rows: int) -> int:
    """Returns the bytes of the rows as the experts get them, and of the permutations that brought
    them there.
    """
    hidden, chosen = config.model.hidden_size, config.model.experts_per_token
    size = rows * hidden * numerics.bytes
    if config.parallel.dispatcher == "allgather":
        # Permuted once, after the gathering; the router's table of all gathered tokens stays.
        gathered = s * config.parallel.expert * config.parallel.expert_tensor
        return size + 8 * rows + gathered * 5 * local_experts(config)
    return size + 8 * s * chosen


def _microbatches_that_meet(config: Config) -> int:
    """Returns the number of microbatches whose tokens the experts of a rank see at once."""
    parallel = config.parallel
    return max(
        1,
        parallel.expert * parallel.expert_tensor // (parallel.tensor * parallel.context),
    )


def _balance(
    config: Config, numerics: Numerics, rows: int, width: int, *, segments: int, split: bool
) -> Saved:
    """Returns what the neuron balance loss keeps: the neurons' weights, and the segment of each
    row.
    """
    balance = config.mone.balance
    if balance.coeff == 0:
        return {}
    if numerics.kernels == "cuda" and not split:
        # The segment of each row, and with normalisation one over its sum of weights.
        return {"neuron balance": rows * (8 + 4 * balance.normalize)}
    if config.mone.memory == "packed":
        return {}
    if _one_function(config, numerics) and balance.weights == "selected" and not split:
        # One over the row's sum of weights; and its segment, where rows are in no order.
        mixed = segments > 1 and _microbatches_that_meet(config) > 1
        return {"neuron balance": rows * (4 * balance.normalize + 4 * segments * mixed)}
    # |a|, and with normalisation after it, too, and two sums of a row.
    neurons = 8 if balance.normalize else 4
    sums = 8 if balance.normalize else 0
    # The activation is computed again; one that keeps its result keeps this one, too.
    keeps_gate = ACTIVATIONS[config.model.activation].keeps_input
    if not keeps_gate and (numerics.bytes < 4 or _intermediates(config)):
        neurons += numerics.bytes
    return {"neuron balance": rows * (neurons * width + sums + 4 * segments)}


def selects_neurons(config: Config, target: str, width: int) -> bool:
    """Returns whether MLPs of a kind ("routed", "shared" or "dense"), ``width`` wide, select
    neurons.
    """
    mone = config.mone
    return mone.enabled and target in mone.apply_to and count_kept(mone.keep_ratio, width) < width


def embedding(config: Config, numerics: Numerics) -> Saved:
    """Returns the bytes by tensor that the first stage keeps beside its layers."""
    saved = {"tokens": 8 * tokens_of_rank(config)}
    if config.model.hidden_dropout:
        saved["dropout masks"] = split_tokens(config) * config.model.hidden_size
    return saved


def output(config: Config, numerics: Numerics, vocab_size: int) -> Saved:
    """Returns the bytes by tensor that the last stage keeps beside its layers: the final norm, the
    logits and a few numbers per token.
    """
    n, s, hidden = tokens_of_rank(config), split_tokens(config), config.model.hidden_size
    vocabulary = config.model.padded_vocab_size(vocab_size) // config.parallel.tensor
    return {
        "final norm": _norm(numerics, s, hidden, heads=1, copied=True)
        + s * hidden * numerics.bytes,
        "logits": n * (numerics.bytes * vocabulary + 13),
    }


def prediction(config: Config, numerics: Numerics, vocab_size: int) -> Saved:
    """Returns the bytes by tensor that one layer of multi-token prediction keeps on the last stage
    beside its transformer layer: what joins the embedding of a later token to the layer below, and
    the logits once more.
    """
    n, s, hidden = tokens_of_rank(config), split_tokens(config), config.model.hidden_size
    logits = output(config, numerics, vocab_size)["logits"]
    row = s * hidden * numerics.bytes
    # The loss keeps its mask, and the output layer its input.
    saved = {"later tokens": 8 * n, "later logits": logits + row + 4 * n}
    if config.train.recompute == "full":
        return saved | {"later embeddings": row}
    norms = 3 * _norm(numerics, s, hidden, heads=1, copied=True)
    return saved | {"later embeddings": norms + 2 * row}
