"""Compiles the kernels of a model's neurons before its first step.

Triton compiles a kernel when it is first launched, which takes seconds. In the middle of a run that
would happen when a panel is first due, or an evaluation, or on one rank alone, while all others
wait for it. Each unit runs its kernels here on a few rows of zeros, in all the forms that the run
can come to need (:meth:`mone_megatron.mone.neurons.NeuronGate.run_each_kernel`).

Shape suffixes: T rows, F neurons of one expert on this rank, S segments of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from mone_megatron.kernels import ops
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.layer import MoNELayer
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert, down_norm
from mone_megatron.mone.neurons import NeuronGate, Segments

_ROWS = 2
# Of megatron-core's `moe_router_dtype`; without one it is the model's own.
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class WarmUp:
    """Tells what was compiled.

    Attributes:
        variants: how many variants of kernels this process has compiled, or read from a cache.
        seconds: how long it took.
        left_to_torch: what torch computes in the kernels' place, a sentence each.
    """

    variants: int
    seconds: float
    left_to_torch: tuple[str, ...]


def warm_up(
    chunks: Iterable[nn.Module], device: torch.device, *, looking: bool, keeping_all: bool
) -> WarmUp | None:
    """Compiles the kernels of all units of a model; collective where neurons are spread over ranks.

    Args:
        chunks: the model.
        device: where it computes.
        looking: whether some steps count which neurons are kept (``logging.layer_interval``).
        keeping_all: whether some steps keep all neurons (``mone.keep_ratio_schedule``).

    Returns:
        What was done; None where no kernel has to be compiled.
    """
    if not ops.on_triton(torch.empty(0, device=device)):
        return None
    before, started = ops.compiled_variants(), time.perf_counter()
    told: dict[str, None] = {}
    for unit in (unit for chunk in chunks for unit in _units(chunk)):
        line = unit.run(device, looking=looking, keeping_all=keeping_all)
        if line is not None:
            told[line] = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return WarmUp(ops.compiled_variants() - before, seconds, tuple(told))


@dataclass(frozen=True)
class _Unit:
    """Describes how a layer calls its gated unit."""

    gate: NeuronGate
    parts: int
    # Of the router's probabilities; None where there are none.
    scale: torch.dtype | None
    # Gives gate and up projections of some rows on a device.
    project: Callable[[torch.device], tuple[Tensor, Tensor]]
    down_norm: Callable[[], Tensor]

    def run(self, device: torch.device, *, looking: bool, keeping_all: bool) -> str | None:
        with torch.no_grad():
            gate_TF, up_TF = self.project(device)
        scale_T = None
        if self.scale is not None:
            scale_T = torch.ones(_ROWS, dtype=self.scale, device=device, requires_grad=True)
        index_T = torch.zeros(_ROWS, dtype=torch.int64, device=device)
        segments = Segments(index_T, self.parts, None, in_order=self.parts == 1)
        return self.gate.run_each_kernel(
            gate_TF,
            up_TF,
            scale_T,
            segments,
            self.down_norm,
            looking=looking,
            keeping_all=keeping_all,
        )


def _of_experts(experts: GroupedExperts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns projections of rows of zeros, all of the first expert."""
    config = experts.config
    rows_TH = torch.zeros(_ROWS, config.hidden_size, dtype=config.params_dtype, device=device)
    counts_E = torch.zeros(experts.num_local_experts, dtype=torch.int64, device=device)
    counts_E[:1].fill_(_ROWS)
    return experts.project(rows_TH, ops.RowGroups.of(counts_E))


def _of_mlp(mlp: MLP, device: torch.device) -> tuple[Tensor, Tensor]:
    neurons = mlp.linear_fc2.weight.shape[1]
    dtype = mlp.config.params_dtype
    return ops.halves(torch.zeros(_ROWS, 2 * neurons, dtype=dtype, device=device))


def _units(chunk: nn.Module) -> Iterator[_Unit]:
    for module in chunk.modules():
        if isinstance(module, MoNELayer):
            config, experts = module.config, module.experts
            yield _Unit(
                experts.neuron_gate,
                module.sources.num_parts,
                _ROUTER_DTYPES.get(config.moe_router_dtype or "", config.params_dtype),
                partial(_of_experts, experts),
                experts.down_norm,
            )
        elif isinstance(module, NeuronMLP | NeuronSharedExpert):
            project = partial(_of_mlp, module)
            yield _Unit(module.neuron_gate, 1, None, project, partial(down_norm, module))
