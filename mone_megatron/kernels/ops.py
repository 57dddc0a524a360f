"""Does the operations of :mod:`.reference` as fast as this device allows, and still exactly.

* CUDA, where Triton is installed: :mod:`.fused`, one kernel forward and one backward.
* CPU in fp32: :mod:`.cpu`.
* Everything else: the reference.

:func:`use_kernels` turns the fast paths off; :func:`describe` says in words what is chosen. The
experts' matrix products are torch's, or Transformer Engine's where it is asked for.

``packed`` is the memory mode. None saves gate and up for the backward pass. With a ``Packed`` only
the kept values of both and the mask as bits are saved (3.5 times less or better at r=1/4).

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import compiled_cpu, cpu, grouped_cpu, reference, te_grouped
from mone_megatron.kernels.experts_cpu import Choice, Rows, TokensThroughExperts
from mone_megatron.kernels.packed import Outputs, packed_glu, rebuilt_when_needed
from mone_megatron.kernels.reference import Activate, Keep, Packed, TopK, WeightSums

__all__ = [
    "KERNEL_SCORE",
    "Choice",
    "RowGroups",
    "Rows",
    "compiled_variants",
    "describe",
    "expert_product",
    "grouped_mm",
    "halves",
    "left_to_torch",
    "rebuilt_when_needed",
    "selected_glu",
    "selected_glu_and_sums",
    "through_experts",
    "topk_mask",
    "use_kernels",
]

# The score by which a kernel of whole experts selects.
KERNEL_SCORE = cpu.FUSED_SCORE
Kernels = Literal["auto", "reference"]
GroupedGemm = Literal["torch", "transformer_engine"]
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_chosen: Kernels = "auto"
_grouped_gemm: GroupedGemm = "torch"


def use_kernels(kernels: Kernels, grouped_gemm: GroupedGemm = "torch") -> None:
    """Chooses the kernels and whose grouped products this process computes with.

    Kernels are the fastest of each operation (the default), or the reference.
    """
    global _chosen, _grouped_gemm
    _chosen, _grouped_gemm = kernels, grouped_gemm


def expect_rows(rows: int, device: torch.device) -> None:
    """Tells the kernels how many rows a call has when experts are used evenly.

    Kernels are chosen once by that, not by what each call has. Nothing where Triton computes not.
    """
    if _chosen == "auto" and device.type == "cuda" and _HAVE_TRITON:
        from mone_megatron.kernels import fused

        fused.expect_rows(rows)


def describe(device: torch.device) -> str:
    """Returns in words what does the work on ``device``."""
    products = ", Transformer Engine's grouped GEMM" if _grouped_gemm != "torch" else ""
    return _neurons(device) + products


def _neurons(device: torch.device) -> str:
    if _chosen == "reference":
        return "reference kernels"
    if device.type == "cuda":
        return "Triton kernels" if _HAVE_TRITON else "reference kernels (Triton is not installed)"
    problem = compiled_cpu.compiled().problem
    return f"CPU kernels of torch ({problem})" if problem else "CPU kernels, compiled here"


def on_triton(tensor: Tensor) -> bool:
    """Returns whether Triton kernels compute with ``tensor``."""
    return _chosen == "auto" and tensor.is_cuda and _HAVE_TRITON


def left_to_torch(gate_TF: Tensor, up_TF: Tensor, keep: Keep, activate: Activate) -> str | None:
    """Returns in words what torch computes of a gated unit although Triton's kernels are chosen.

    None where it is nothing, or where they are not chosen (:func:`describe` says that).
    """
    if not on_triton(gate_TF):
        return None
    from mone_megatron.kernels import fused

    return fused.left_to_torch(gate_TF, up_TF, keep, activate)


def compiled_variants() -> int:
    """Returns how many variants of Triton kernels this process has; 0 where none computes."""
    if not _HAVE_TRITON:
        return 0
    from mone_megatron.kernels import fused

    return fused.compiled_variants()


@dataclass(frozen=True)
class RowGroups:
    """Says how many rows each of E experts has; they lie expert after expert."""

    # int64, on the host where it has them.
    counts_E: Tensor
    # The same, on the device of the rows.
    counts_on_device_E: Tensor
    # int32, where each one's end, on the device of the rows.
    ends_E: Tensor

    @functools.cached_property
    def counts(self) -> list[int]:
        """Returns the counts as numbers, read once; a GPU would be waited for."""
        numbers: list[int] = self.counts_E.tolist()
        return numbers

    @classmethod
    def of(cls, counts_E: Tensor, counts_on_device_E: Tensor | None = None) -> RowGroups:
        """Returns the groups of rows that have these counts.

        Args:
            counts_E: int64, the rows of each expert, on any device.
            counts_on_device_E: the same numbers where the rows lie; None when ``counts_E`` does.
        """
        if counts_on_device_E is None:
            counts_on_device_E = counts_E
        return cls(counts_E, counts_on_device_E, counts_on_device_E.cumsum(0).to(torch.int32))


def grouped_mm(rows_TI: Tensor, weight_EIO: Tensor, groups: RowGroups) -> Tensor:
    """Returns each expert's rows times its matrix, ``[T, O]`` (I values in, O out).

    ``weight_EIO`` is contiguous, or the transpose of a contiguous ``[E, O, I]``.
    """
    if _grouped_gemm == "transformer_engine":
        return te_grouped.grouped_mm(rows_TI, weight_EIO, groups.counts_E)
    if weight_EIO.requires_grad and leaves_gradients_unwritten(weight_EIO.device):
        weight_EIO = _ZeroWithoutRows.apply(weight_EIO, groups.counts_on_device_E)
    return F.grouped_mm(rows_TI, weight_EIO, offs=groups.ends_E)


def expert_product(
    rows_TI: Tensor, weight: Tensor, groups: RowGroups, *, outputs_first: bool = False
) -> Tensor:
    """Returns each expert's rows times its matrix, ``[T, O]`` (I values in, O out).

    The gradient may go straight to the weight's ``main_grad``: on CPU in fp32
    (:mod:`.grouped_cpu`), and by Transformer Engine (:mod:`.te_grouped`).

    Args:
        rows_TI: expert after expert.
        weight: contiguous, ``[E, ...]``: for each expert ``[I, O]``, or ``[O, I]`` with
            ``outputs_first``, in any shape of so many values.
        groups: the rows of each expert.
        outputs_first: see ``weight``.
    """
    plain = rows_TI.dtype is weight.dtype is torch.float32 and _grouped_gemm == "torch"
    if plain and not rows_TI.is_cuda:
        return grouped_cpu.grouped_product(
            rows_TI, weight, groups.counts, outputs_first=outputs_first
        )
    if outputs_first:
        matrix_EIO = weight.view(len(weight), -1, rows_TI.shape[-1]).transpose(1, 2)
    else:
        matrix_EIO = weight.view(len(weight), rows_TI.shape[-1], -1)
    if _grouped_gemm == "transformer_engine":
        return te_grouped.grouped_mm(rows_TI, matrix_EIO, groups.counts_E, parameter=weight)
    return grouped_mm(rows_TI, matrix_EIO, groups)


def through_experts(
    tokens_NH: Tensor,
    probs_NA: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    rows: Rows,
    choice: Choice,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Returns all that the experts of one rank make of its tokens; None where nothing does so.

    That is on CPU in fp32, where there is a compiler (:mod:`.experts_cpu`, which says what is
    given and returned).
    """
    weights = gate_up_weight, down_weight
    plain = all(
        tensor.dtype is torch.float32 and not tensor.is_cuda
        for tensor in (tokens_NH, probs_NA, *weights)
    )
    alike = len({getattr(weight, "adds_to_main_grad", False) for weight in weights}) == 1
    if not (plain and alike and _chosen == "auto" and _grouped_gemm == "torch"):
        return None
    functions = compiled_cpu.compiled_products()
    if functions is None:
        return None
    outputs: tuple[Tensor, Tensor | None, Tensor | None] = TokensThroughExperts.apply(
        functions, tokens_NH, probs_NA, *weights, rows, choice
    )
    return outputs


def leaves_gradients_unwritten(device: torch.device) -> bool:
    """Returns whether torch's grouped product may not write gradients of experts without rows.

    Reported of Blackwell GPUs, where what the memory held before would be taken for a gradient. Not
    run here; ``pytest --gpu`` asks the GPU that there is.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


class _ZeroWithoutRows(torch.autograd.Function):
    """Passes the weight on; its gradient is zero for experts without rows. No host waits."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight_EIO: Tensor, counts_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(counts_E)
        return weight_EIO.view_as(weight_EIO)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_EIO: Tensor) -> tuple[Tensor, None]:
        (counts_E,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_EIO.masked_fill((counts_E == 0).view(-1, 1, 1), 0.0), None


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the two halves of the columns of a matrix, as ``chunk`` does.

    Their gradients are put together without a copy where they are halves of one already, as those
    of the gated units here are.
    """
    first, second = _Halves.apply(both)
    return first, second


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, both: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        first, second = both.chunk(2, dim=-1)
        return first, second

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, first: Tensor | None, second: Tensor | None
    ) -> Tensor | None:
        if first is None or second is None:
            given = second if first is None else first
            if given is None:
                return None
            zeros = torch.zeros_like(given)
            first, second = (zeros, given) if first is None else (given, zeros)
        whole = _whole_of(first, second)
        return torch.cat([first, second], dim=-1) if whole is None else whole


def _whole_of(first_TF: Tensor, second_TF: Tensor) -> Tensor | None:
    """Returns the tensor whose halves these are, as a view; None where they are of no one."""
    width = first_TF.shape[-1]
    adjacent = (
        first_TF.stride() == second_TF.stride() == (2 * width, 1)
        and first_TF.untyped_storage().data_ptr() == second_TF.untyped_storage().data_ptr()
        and second_TF.storage_offset() == first_TF.storage_offset() + width
    )
    if not adjacent:
        return None
    return first_TF.as_strided((len(first_TF), 2 * width), first_TF.stride())


def topk_mask(scores_TF: Tensor, k: int) -> Tensor:
    """Returns the mask of :func:`mone_megatron.kernels.reference.topk_mask`, bit for bit."""
    if on_triton(scores_TF):
        from mone_megatron.kernels import fused

        # Scores of other dtypes become fp32.
        dtype = torch.bfloat16 if scores_TF.dtype is torch.bfloat16 else torch.float32
        if scores_TF.shape[-1] <= fused.MOST_NEURONS[dtype]:
            return fused.topk_mask(scores_TF, k)
    if _chosen == "auto" and not scores_TF.is_cuda:
        return cpu.topk_mask(scores_TF, k)
    return reference.topk_mask(scores_TF, k)


def selected_glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    keep: Keep,
    scale_T: Tensor | None,
    activate: Activate = F.silu,
    *,
    packed: Packed | None = None,
) -> Tensor:
    """Returns ``a * u`` at the neurons that ``keep`` names, times the router's weight of a row.

    As :func:`mone_megatron.kernels.reference.selected_glu`; a rule for ``keep`` lets one kernel
    select and multiply.
    """
    hidden_TF, _, _ = _glu(gate_TF, up_TF, scale_T, keep, activate, packed, None)
    return hidden_TF


def selected_glu_and_sums(
    gate_TF: Tensor,
    up_TF: Tensor,
    keep: Keep,
    scale_T: Tensor | None,
    sums: WeightSums,
    activate: Activate = F.silu,
    *,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns :func:`selected_glu` and what the balance loss asks of kept neurons, in one pass.

    Args:
        gate_TF: gate projections, of all neurons of the expert.
        up_TF: up projections.
        keep: which neurons are kept; not None.
        scale_T: the router's probability of each row, or None.
        sums: the sums that are wanted.
        activate: the function that gives the activation a of the gate projection g.
        packed: the memory mode, see the top of this file.

    Returns:
        ``[T, F]`` hidden values; ``[S, F]`` fp32 sums over the rows of a segment of the weights;
        ``[S, F]`` fp32 counts of rows that keep each neuron. Gradients flow through the first two.

    Raises:
        ValueError: for weights of all neurons in packed memory mode, which lets the other values
            go.
    """
    if packed is not None and sums.weights == "all":
        raise ValueError(
            "mone.memory: packed forgets the neurons that are not kept, and "
            "mone.balance.weights=all needs them; use mone.memory=full or weights=selected"
        )
    hidden_TF, weight_sum_SF, kept_SF = _glu(gate_TF, up_TF, scale_T, keep, activate, packed, sums)
    assert weight_sum_SF is not None
    assert kept_SF is not None
    return hidden_TF, weight_sum_SF, kept_SF


def _glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    scale_T: Tensor | None,
    keep: Keep,
    activate: Activate,
    packed: Packed | None,
    sums: WeightSums | None,
) -> Outputs:
    if on_triton(gate_TF):
        from mone_megatron.kernels import fused

        if fused.supports(gate_TF, up_TF, activate):
            return fused.fused_glu(
                gate_TF,
                up_TF,
                scale_T,
                keep,
                activate=activate,
                packed=packed,
                sums=sums,
            )
    saving = torch.is_grad_enabled() and (gate_TF.requires_grad or up_TF.requires_grad)
    on_cpu = _chosen == "auto" and not gate_TF.is_cuda
    fast = on_cpu and cpu.supports(gate_TF, up_TF, scale_T, activate=activate, sums=sums)
    if fast and not (packed is not None and saving):
        return cpu.selected_swiglu(gate_TF, up_TF, scale_T, keep, sums)
    mask_TF = keep
    if isinstance(keep, TopK):
        with torch.no_grad():
            scores_TF = reference.neuron_scores(gate_TF, up_TF, keep.score, activate)
            mask_TF = topk_mask(scores_TF, keep.k)
    assert not isinstance(mask_TF, TopK)

    def run(
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        mask_TF: Tensor | None,
        sums: WeightSums | None,
    ) -> Outputs:
        if fast:
            return cpu.selected_swiglu(gate_TF, up_TF, scale_T, mask_TF, sums)
        hidden_TF = reference.selected_glu(gate_TF, up_TF, mask_TF, scale_T, activate)
        if sums is None:
            return hidden_TF, None, None
        assert mask_TF is not None
        return hidden_TF, *reference.weight_sums(gate_TF, mask_TF, sums, activate)

    if packed is not None and mask_TF is not None and saving:
        return packed_glu(gate_TF, up_TF, scale_T, mask_TF, run, sums, packed)
    return run(gate_TF, up_TF, scale_T, mask_TF, sums)
