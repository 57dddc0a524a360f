"""Computes routed experts with neuron selection, in the place of vLLM's own.

vLLM computes a layer's experts by a class that it chooses for the device; ours extend two of them.

Shape suffixes: N tokens, K experts of a token, T rows (N * K: a token once for each of its
experts), F neurons of an expert on this rank, E experts on this rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.utils import replace_parameter

from mone_vllm.gather import GatheredRows
from mone_vllm.selection import Selection


class SelectingExperts:
    """Holds what both classes of experts share.

    Attributes:
        selection: which neurons are kept; None for all of them, where the layer needs our class
            for another reason.
        activate: a as a function of g.
        layer_name: by which the layer is found in vLLM's forward context.
        state: of the selection's rule, by name, ``[E]`` each.
    """

    selection: Selection | None
    activate: Any
    layer_name: str
    state: Mapping[str, Tensor]
    down_norm_EF: Tensor | None = None

    def remember_norms(self, down_EHF: Tensor) -> None:
        """Keeps the norms of the down projections' rows, for scores that read them."""
        if self.selection is not None and self.selection.reads_down_norm:
            self.down_norm_EF = torch.linalg.vector_norm(down_EHF, dim=1, dtype=torch.float32)

    def hidden(self, gate_up: Tensor, expert_T: Tensor, num_experts: int) -> Tensor:
        """Returns the input of the down projections, ``[T, F]``.

        Args:
            gate_up: gate and up projections side by side, ``[T, 2 F]``.
            expert_T: int64, the expert on this rank of each row.
            num_experts: E.
        """
        if self.selection is None:
            gate_TF, up_TF = gate_up.chunk(2, dim=-1)
            return self.activate(gate_TF) * up_TF
        norm_TF = None if self.down_norm_EF is None else self.down_norm_EF[expert_T]
        return self.selection.hidden(
            gate_up,
            down_norm_TF=norm_TF,
            state=self.state,
            expert_T=expert_T,
            num_experts=num_experts,
        )


# An op, so that torch.compile, which traces the CPU's experts, does not look inside.
@torch.library.custom_op("mone::experts", mutates_args=("output",))
def experts_op(
    output: Tensor,
    hidden_NH: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    weights_NK: Tensor,
    ids_NK: Tensor,
    layer_name: str,
) -> None:
    """Writes the experts' output ``[N, H]``; ids of -1 (other ranks') add nothing."""
    layer = get_forward_context().no_compile_layers[layer_name]
    experts = layer.routed_experts.quant_method.moe_kernel.fused_experts
    output.copy_(experts.compute(hidden_NH, gate_up_weight, down_weight, weights_NK, ids_NK))


@experts_op.register_fake
def _(
    output: Tensor,
    hidden_NH: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    weights_NK: Tensor,
    ids_NK: Tensor,
    layer_name: str,
) -> None:
    """Does nothing: the output is there."""


class MoneCpuExperts(SelectingExperts, CPUUnquantizedExperts):
    """Computes experts in torch, since vLLM's CPU op has the activation inside."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lays the down projections out neuron by neuron; nothing is packed for vLLM's op."""
        self._use_zentorch = False
        self.remember_norms(layer.w2_weight)
        replace_parameter(layer, "w2_weight", layer.w2_weight.mT.contiguous())
        self.gathered = GatheredRows.of(self.selection, layer.w13_weight, layer.w2_weight)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        *args: Any,
        **others: Any,
    ) -> None:
        """Writes the experts' output into ``output``, ``[N, H]``."""
        ids_NK = topk_ids.long()
        if expert_map is not None:
            ids_NK = expert_map[ids_NK].long()
        torch.ops.mone.experts(output, hidden_states, w1, w2, topk_weights, ids_NK, self.layer_name)

    def compute(
        self,
        hidden_NH: Tensor,
        gate_up_EFH: Tensor,
        down_EFH: Tensor,
        weights_NK: Tensor,
        ids_NK: Tensor,
    ) -> Tensor:
        """Returns the experts' output, ``[N, H]``: gathered rows for few tokens, else whole."""
        if self.gathered is not None and self.gathered.pays(*ids_NK.shape):
            return self.gathered.compute(hidden_NH, weights_NK, ids_NK)
        num_experts, per_token = len(gate_up_EFH), ids_NK.shape[1]
        order_T = ids_NK.flatten().argsort(stable=True)
        expert_T = ids_NK.flatten()[order_T]
        counts = torch.bincount(expert_T + 1, minlength=num_experts + 1)
        starts = counts.cumsum(0).tolist()
        spans = [
            (expert, slice(starts[expert], starts[expert + 1]))
            for expert in range(num_experts)
            if starts[expert + 1] > starts[expert]
        ]
        x_TH = hidden_NH[order_T // per_token]
        gate_up = x_TH.new_zeros(len(x_TH), gate_up_EFH.shape[1])
        for expert, rows in spans:
            gate_up[rows] = F.linear(x_TH[rows], gate_up_EFH[expert])
        hidden_TF = self.hidden(gate_up, expert_T.clamp(min=0), num_experts)
        out_TH = torch.zeros_like(x_TH)
        for expert, rows in spans:
            out_TH[rows] = hidden_TF[rows] @ down_EFH[expert]
        out_TH *= weights_NK.flatten()[order_T].unsqueeze(-1).to(out_TH.dtype)
        return out_TH[order_T.argsort()].unflatten(0, (-1, per_token)).sum(dim=1)


class MoneTritonExperts(SelectingExperts, TritonExperts):
    """Runs vLLM's grouped products on CUDA, with the selection between them.

    The class was written from vLLM's source and has not been run: no GPU was at hand.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keeps what the score reads of the weights."""
        super().process_weights_after_loading(layer)
        self.remember_norms(layer.w2_weight)
        self._num_experts = len(layer.w2_weight)

    def apply(self, *args: Any, **kwargs: Any) -> None:
        """Computes as vLLM does; the rows' experts are kept for the selection."""
        ids_NK, expert_map = kwargs["topk_ids"].long(), kwargs["expert_map"]
        if expert_map is not None:
            ids_NK = expert_map[ids_NK].long()
        self._expert_T = ids_NK.flatten().clamp(min=0)
        super().apply(*args, **kwargs)

    def activation(
        self, activation: MoEActivation, output: Tensor, input: Tensor, **kwargs: Any
    ) -> None:
        """Writes ``[T, F]`` hidden values of ``[T, 2 F]`` projections; rows are token by token."""
        output.copy_(self.hidden(input, self._expert_T, self._num_experts))


# vLLM's class -> ours in its place.
_OURS: dict[type, type] = {
    CPUUnquantizedExperts: MoneCpuExperts,
    TritonExperts: MoneTritonExperts,
}


def experts_class(
    theirs: type,
    selection: Selection | None,
    activate: Any,
    layer_name: str,
    state: Mapping[str, Tensor],
) -> type:
    """Returns the class that computes what one of vLLM's does, with selection.

    Args:
        theirs: vLLM's choice for the device and the configuration.
        selection: None keeps all neurons.
        activate: a as a function of g.
        layer_name: the layer's.
        state: of the selection's rule, which is filled in when the weights are loaded.

    Raises:
        ValueError: there is none, and it must not be computed without.
    """
    settings = {
        "selection": selection,
        "activate": staticmethod(activate),
        "layer_name": layer_name,
        "state": state,
    }
    for base, ours in _OURS.items():
        if issubclass(theirs, base):
            return type(ours.__name__, (ours,), settings)
    raise ValueError(
        f"MoneForCausalLM: vLLM chose {theirs.__name__} for the experts, which mone-vllm does not "
        'make select; use --kernel-config \'{"moe_backend": "triton"}\', or a CPU'
    )
