"""Defines what an activation is: it makes the weights a of neurons of the gate projection g.

It imports no torch, so that names can be checked without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from mone_megatron.methods.registry import imported

if TYPE_CHECKING:
    from torch import Tensor

Activate = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Activation:
    """Describes one activation; ``model.activation`` names it.

    Attributes:
        name: as in the configuration, and as transformers knows it (``hidden_act``).
        formula: what it computes, for tables and figures.
        source: the paper or place that it comes from.
        reference: ``module:attribute`` of the function of a tensor, elementwise.
        up: ``module:attribute`` of the function of the up projection, elementwise, where it is not
            taken as it is; the unit is reference(g) * up(u). ``reference`` must then be a function
            of this activation alone, by which experts find it. Only the experts and the MLPs that
            select neurons compute it.
        rectified_gate: where ``up`` is max(u, 0), transformers' name of the reference alone: our
            own class there has it beside ``rectified_up``. "" where no export holds the activation.
        keeps_input: whether its backward pass needs the gate projection, rather than its result.
        intermediates: how many tensors of the gate's size autograd keeps beside its input and its
            result; the planner counts them.
        fused_on_cpu: whether :mod:`mone_megatron.kernels.cpu` computes it within its one function.
        fused: ``module:attribute`` of its forms in Triton, a
            :class:`mone_megatron.kernels.triton_activations.FusedActivation`. None lets torch
            compute it, which is correct and slower.
        fused_by_megatron: whether megatron-core's own MLPs compute the gated unit as one function
            on GPUs, which keeps its input alone (``bias_activation_fusion``).
    """

    name: str
    formula: str
    source: str
    reference: str
    up: str | None = None
    rectified_gate: str = ""
    keeps_input: bool = True
    intermediates: int = 0
    fused_on_cpu: bool = False
    fused: str | None = None
    fused_by_megatron: bool = False

    @cached_property
    def function(self) -> Activate:
        """Returns the function itself; importing torch is left until it is asked for."""
        return cast(Activate, imported(self.reference))
