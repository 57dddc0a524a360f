"""Defines the experts implementation ``mone_sparse``, which reads kept neurons' rows only.

It is chosen by::

    import mone_megatron.hf
    model.set_experts_implementation("mone_sparse")

A step of few tokens is then computed with :func:`mone_megatron.kernels.decode.sparse_experts`, and
everything else (prompts, large batches, training) as ``mone`` does. The selection is the same.

The first such step lays the down projections out neuron by neuron, in place: shapes, values and
what ``save_pretrained`` writes stay as they are, only the strides change, and no copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from mone_megatron.hf.experts_mone import (
    ExpertsModule,
    NeuronSettings,
    experts_modules,
    has_own_gate,
    has_own_weights,
    mone_experts_forward,
    neurons_of,
    rectifies_up,
    register_selecting,
    selects,
    settings_of,
)
from mone_megatron.hf.guard_mone import note_selected
from mone_megatron.kernels.decode import ExpertWeights, sparse_experts, speed_limit
from mone_megatron.kernels.reference import TopK
from mone_megatron.methods.activations import ACTIVATIONS

MONE_SPARSE = "mone_sparse"
# Below this limit of the speed-up whole matrices are multiplied.
WORTH_IT = 1.15
# What choosing and gathering rows costs on CPU, in bytes that could be read instead: about half a
# millisecond a layer (docs/performance.md). Smaller layers are multiplied whole.
OVERHEAD_BYTES = 8_000_000


def mone_sparse_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Returns the output ``[N, h]`` of tokens ``[N, h]``, summed over their experts.

    ``top_k_index`` and ``top_k_weights`` are the numbers and weights of each token's experts,
    ``[N, K]``.

    Raises:
        ValueError: for experts that are more than three matrices.
    """
    experts = cast(ExpertsModule, self)
    settings = settings_of(experts)
    note_selected(self)
    sparse = selects(experts) and settings.is_top_k and not torch.is_grad_enabled()
    if not sparse or not _worth_it(experts, settings, *top_k_index.shape):
        return mone_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if reason := unsupported(experts):
        raise ValueError(f"{MONE_SPARSE}: {type(self).__name__} {reason}; use mone")
    return sparse_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        _weights(experts),
        TopK(settings.kept(experts.intermediate_dim), settings.score),
        _activation(experts),
    )


def _activation(experts: ExpertsModule) -> Callable[[Tensor], Tensor]:
    """Returns torch's function where the module is transformers' form of one that kernels know."""
    name: str = getattr(experts.config, "hidden_act", "")
    if name in ACTIVATIONS and name in ACT2FN and isinstance(experts.act_fn, type(ACT2FN[name])):
        return ACTIVATIONS[name].function
    return experts.act_fn


def unsupported(experts: ExpertsModule) -> str | None:
    """Returns why the rows of neurons are not all there is to these experts; None if they are."""
    if has_own_weights(experts):
        return "has a gate that is no matrix of its own (model.gate)"
    if has_own_gate(experts):
        return "computes its gate in a way of its own"
    if rectifies_up(experts):
        return "rectifies its up projection"
    if experts.has_bias:
        return "has biases"
    if experts.has_post_expert_norm:
        return "normalises its output"
    neurons = neurons_of(experts)
    here = experts.down_proj.shape[1 if experts.is_transposed else 2]
    if experts._is_expert_parallel or neurons.mesh is not None or here != neurons.count:
        return "is spread over devices"
    return None


def speeds_up(model: PreTrainedModel, chosen: int) -> bool:
    """Returns whether ``mone_sparse`` pays for one token that takes ``chosen`` experts a layer."""
    modules = [cast(ExpertsModule, module) for module in experts_modules(model)]
    return bool(modules) and all(
        selects(experts)
        and settings_of(experts).is_top_k
        and unsupported(experts) is None
        and _worth_it(experts, settings_of(experts), 1, chosen)
        for experts in modules
    )


def _worth_it(experts: ExpertsModule, settings: NeuronSettings, tokens: int, chosen: int) -> bool:
    if tokens == 0:
        return False
    limit = speed_limit(
        tokens, experts=experts.num_experts, chosen=chosen, keep_ratio=settings.keep_ratio
    )
    weight = experts.down_proj
    # Of what whole matrices would read, by the limit above.
    touched = 1 - (1 - chosen / experts.num_experts) ** tokens
    read = 3 * touched * weight.numel() * weight.element_size()
    saved = read * (1 - 1 / limit)
    return limit >= WORTH_IT and (weight.is_cuda or saved >= OVERHEAD_BYTES)


def _weights(experts: ExpertsModule) -> ExpertWeights:
    gate_up = _rows(experts.gate_up_proj, neurons_first=not experts.is_transposed)
    if experts.is_concatenated:
        gate, up = gate_up.chunk(2, dim=1)
    else:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    return ExpertWeights(gate, up, _rows(experts.down_proj, neurons_first=experts.is_transposed))


def _rows(parameter: Tensor, *, neurons_first: bool) -> Tensor:
    """Returns a weight as ``[E, neurons, h]`` with contiguous rows.

    The parameter's storage is laid out anew where they are not.
    """
    rows = parameter if neurons_first else parameter.transpose(1, 2)
    if rows.stride(-1) == 1:
        return rows
    rows = rows.contiguous()
    parameter.data = rows if neurons_first else rows.transpose(1, 2)
    return rows


def register_decoding() -> None:
    """Makes ``mone_sparse`` known to transformers; may be called again."""
    register_selecting(MONE_SPARSE, mone_sparse_experts_forward)
