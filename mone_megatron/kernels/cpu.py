"""Has the fast paths on CPU in fp32: the top-k mask, and SwiGLU with selection in one function.

The k-th largest score comes from numpy's vectorised partial sort (4 to 5 times faster than
``torch.topk`` for rows of a few hundred). One autograd function takes a block of rows after the
other through selection, SwiGLU and the balance loss's sums. Where there is a C compiler,
:mod:`.compiled_glu` does so instead.
docs/performance.md has the figures.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows; B the
rows of a block, R those of a run of one segment in it.
"""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import reference
from mone_megatron.kernels.compiled_cpu import compiled
from mone_megatron.kernels.compiled_glu import CompiledSwiGLU
from mone_megatron.kernels.reference import TINY, Activate, Keep, TopK, WeightSums

# The score that the function below ranks by itself; torch computes every other one for it.
FUSED_SCORE = "abs_activation"
# Elements a thread works on at a time: few enough for a core's share of the cache, enough for the
# calls not to count.
_BLOCK_ELEMENTS = 131072
# Runs of fewer rows on average are not worth a call each.
_ROWS_OF_A_RUN = 8


def _rows_in_block(neurons: int, threads: int) -> int:
    return max(1, _BLOCK_ELEMENTS * threads // neurons)


def supports(*tensors: Tensor | None, activate: Activate, sums: WeightSums | None) -> bool:
    """Returns whether :func:`selected_swiglu` can: fp32, SiLU, weights of selected neurons."""
    return (
        activate is F.silu
        and (sums is None or sums.weights == "selected")
        and all(tensor is None or tensor.dtype is torch.float32 for tensor in tensors)
    )


def topk_mask(scores_TF: Tensor, k: int) -> Tensor:
    """Returns the mask of :func:`mone_megatron.kernels.reference.topk_mask`, bit for bit."""
    if scores_TF.shape[0] == 0:
        return reference.topk_mask(scores_TF, k)
    scores_TF = scores_TF.detach().float()
    rows, neurons = scores_TF.shape
    mask_TF = torch.empty(rows, neurons, dtype=torch.bool)
    step = _rows_in_block(neurons, threads=1)
    (scratch,) = _scratch(1, min(step, rows), neurons)
    for scores_BF, mask_BF in zip(scores_TF.split(step), mask_TF.split(step), strict=True):
        no_signs = bool(scores_BF.amin() >= 0)  # of NaN it is not
        _select(scores_BF, k, scratch, mask_BF, scratch[: len(scores_BF)], no_signs=no_signs)
    return mask_TF


def kept_places(scores_TF: Tensor, k: int) -> Tensor | None:
    """Returns where the ``k`` largest of each row are in ``[T, F]``, counted through.

    Returns:
        int64 ``[T * k]`` in order; None where it takes more than a threshold to say (ties, NaN).
    """
    scores_TF = scores_TF.detach().float()
    scores = scores_TF.numpy()
    rows, neurons = scores.shape
    kth = np.partition(scores, neurons - k, axis=-1)[:, neurons - k, None]
    places = np.flatnonzero(scores >= kth)
    exact = len(places) == rows * k and not _has_nan(scores_TF)
    return torch.from_numpy(places) if exact else None


# Memory of each thread for temporaries: fresh memory costs more than the arithmetic on it.
_memory = threading.local()


def _scratch(count: int, rows: int, neurons: int) -> tuple[Tensor, ...]:
    """Returns fp32 ``[B, F]`` temporaries, which the next call in this thread overwrites."""
    needed = count * rows * neurons
    memory: Tensor | None = getattr(_memory, "tensor", None)
    if memory is None or len(memory) < needed:
        memory = _memory.tensor = torch.empty(needed)
    return memory[:needed].view(count, rows, neurons).unbind()


def _has_nan(largest: Tensor) -> bool:
    """Returns whether a NaN is among the k largest scores of each row, or all of them.

    A threshold keeps k or more of a row without NaN. A NaN is the largest score to numpy, so ties
    may hide it in the count of what is kept; the sum shows it.
    """
    return bool(largest.sum().isnan())


def _select(
    scores_BF: Tensor,
    k: int,
    scratch_BF: Tensor,
    mask_BF: Tensor,
    kept_BF: Tensor,
    *,
    no_signs: bool = False,
) -> None:
    """Writes the mask of a block into ``mask_BF``, and into ``kept_BF`` as 0 and 1 in fp32.

    ``scratch_BF`` holds as many rows or more, and may be ``kept_BF``. ``no_signs`` says that no
    score has its sign bit set, NaN neither.
    """
    ordered_BF = scratch_BF[: len(scores_BF)].copy_(scores_BF)
    place = scores_BF.shape[-1] - k
    ordered = ordered_BF.numpy()
    # Without signs floats are in the order of their bits, and numbers without NaN are partitioned
    # in half the time.
    (ordered.view(np.int32) if no_signs else ordered).partition(place, axis=-1)
    kth_B1 = ordered_BF[:, place : place + 1].clone()
    has_nan = _has_nan(ordered_BF[:, place:])
    # Into fp32 torch compares several at a time, into bool one.
    torch.ge(scores_BF, kth_B1, out=kept_BF)
    mask_BF.copy_(kept_BF)
    if not has_nan and int(np.count_nonzero(mask_BF.numpy())) == k * len(scores_BF):
        return
    # Some row ties at its threshold, or holds NaN: mend those rows only.
    nan_B1 = scores_BF.isnan().any(dim=-1, keepdim=True)
    odd = (mask_BF.sum(dim=-1, keepdim=True).ne(k) | nan_B1).squeeze(-1).nonzero().squeeze(-1)
    kth_B1 = kth_B1.masked_fill(nan_B1, torch.nan)
    mask_BF[odd] = reference.mask_at_threshold(scores_BF[odd], kth_B1[odd], k)
    _as_float(mask_BF, out=kept_BF)


def selected_swiglu(
    gate_TF: Tensor,
    up_TF: Tensor,
    scale_T: Tensor | None,
    keep: Keep,
    sums: WeightSums | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns hidden values, and with ``sums`` sums of weights and counts (see :mod:`.ops`)."""
    if isinstance(keep, TopK) and keep.score != FUSED_SCORE:
        with torch.no_grad():
            keep = topk_mask(reference.neuron_scores(gate_TF, up_TF, keep.score), keep.k)
    mask_TF = k = None
    if isinstance(keep, TopK):
        k = keep.k
    else:
        mask_TF = keep
    outputs: tuple[Tensor, Tensor | None, Tensor | None]
    library = compiled().library
    # Sums are of selected neurons; where nothing selects, torch's function says what they are.
    if library is not None and (sums is None or mask_TF is not None or k is not None):
        outputs = CompiledSwiGLU.apply(library, gate_TF, up_TF, mask_TF, k, scale_T, sums)
    else:
        outputs = _SelectedSwiGLU.apply(gate_TF, up_TF, mask_TF, k, scale_T, sums)
    return outputs


class _Segments(Protocol):
    """Adds up over segments of rows, a block (``rows`` of all) at a time."""

    def add(self, rows: slice, values_BF: Tensor, factor_B: Tensor | None, sums_SF: Tensor) -> None:
        """Adds each row of ``values_BF`` (times its factor) to the sum of its segment."""

    def dots(self, rows: slice, sums_SF: Tensor, values_BF: Tensor) -> Tensor:
        """Returns the product of each row with its segment's row of ``sums_SF``, ``[B]``."""

    def spread(self, rows: slice, sums_SF: Tensor, less_B: Tensor | None, out_BF: Tensor) -> None:
        """Writes its segment's row of ``sums_SF``, less a number, to each row."""


class _Runs:
    """Adds up consecutive rows, where they lie segment after segment.

    Views of all runs of a block are made in one call.
    """

    def __init__(self, counts_S: Tensor, blocks: list[slice]) -> None:
        """Cuts the rows of each of ``blocks``, in their order, where a segment ends."""
        left_S, segment = counts_S.tolist(), 0
        # Of each block, by its first row: the segments with rows there, and how many of each.
        self.runs: dict[int, tuple[list[int], list[int]]] = {}
        for block in blocks:
            segments, lengths, room = [], [], block.stop - block.start
            while room:
                if length := min(left_S[segment], room):
                    segments.append(segment)
                    lengths.append(length)
                    left_S[segment] -= length
                    room -= length
                if not left_S[segment]:
                    segment += 1
            self.runs[block.start] = segments, lengths

    def add(self, rows: slice, values_BF: Tensor, factor_B: Tensor | None, sums_SF: Tensor) -> None:
        segments, lengths = self.runs[rows.start]
        sums_F = sums_SF.unbind()
        parts = values_BF.split_with_sizes(lengths)
        if factor_B is None:
            for segment, part in zip(segments, parts, strict=True):
                sums_F[segment].add_(part.sum(dim=0))
            return
        factors = factor_B.split_with_sizes(lengths)
        for segment, part, factor in zip(segments, parts, factors, strict=True):
            sums_F[segment].addmv_(part.t(), factor)

    def dots(self, rows: slice, sums_SF: Tensor, values_BF: Tensor) -> Tensor:
        segments, lengths = self.runs[rows.start]
        sums_F = sums_SF.unbind()
        products_B = values_BF.new_empty(len(values_BF))
        parts = values_BF.split_with_sizes(lengths), products_B.split_with_sizes(lengths)
        for segment, part, products in zip(segments, *parts, strict=True):
            torch.mv(part, sums_F[segment], out=products)
        return products_B

    def spread(self, rows: slice, sums_SF: Tensor, less_B: Tensor | None, out_BF: Tensor) -> None:
        segments, lengths = self.runs[rows.start]
        sums_F = sums_SF.unbind()
        parts = out_BF.split_with_sizes(lengths)
        if less_B is None:
            for segment, part in zip(segments, parts, strict=True):
                part.copy_(sums_F[segment])
            return
        columns = less_B.unsqueeze(-1).split_with_sizes(lengths)
        for segment, part, less in zip(segments, parts, columns, strict=True):
            torch.sub(sums_F[segment], less, out=part)


class _Matrix:
    """Adds up rows in any order, or in many short runs, by products with a matrix of ones."""

    def __init__(self, sums: WeightSums) -> None:
        self.matrix_ST = reference.segment_matrix(sums.segment_T, sums.segments)

    def add(self, rows: slice, values_BF: Tensor, factor_B: Tensor | None, sums_SF: Tensor) -> None:
        matrix_SB = self.matrix_ST[:, rows]
        sums_SF.addmm_(matrix_SB if factor_B is None else matrix_SB * factor_B, values_BF)

    def dots(self, rows: slice, sums_SF: Tensor, values_BF: Tensor) -> Tensor:
        return (self.matrix_ST[:, rows] * (sums_SF @ values_BF.T)).sum(dim=0)

    def spread(self, rows: slice, sums_SF: Tensor, less_B: Tensor | None, out_BF: Tensor) -> None:
        torch.mm(self.matrix_ST[:, rows].T, sums_SF, out=out_BF)
        if less_B is not None:
            out_BF.sub_(less_B.unsqueeze(-1))


def _segments(sums: WeightSums, blocks: list[slice]) -> _Segments:
    rows = len(sums.segment_T)
    if sums.in_order:
        counts_S = torch.bincount(sums.segment_T, minlength=sums.segments)
        if rows >= _ROWS_OF_A_RUN * int(counts_S.count_nonzero()):
            return _Runs(counts_S, blocks)
    return _Matrix(sums)


class _SelectedSwiGLU(torch.autograd.Function):
    """Computes SwiGLU at the selected neurons, and with ``sums`` the sums of their weights.

    The neurons are a mask's, or the ``k`` with the largest |a|. Unselected entries are multiplied
    by zero, so that NaN spreads.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate_TF: Tensor,
        up_TF: Tensor,
        mask_TF: Tensor | None,
        k: int | None,
        scale_T: Tensor | None,
        sums: WeightSums | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, neurons = gate_TF.shape
        hidden_TF = torch.empty(rows, neurons)
        if k is not None:
            mask_TF = torch.empty(rows, neurons, dtype=torch.bool)
        weight_sum_SF = kept_SF = inverse_T = segments = None
        blocks = _blocks(rows, neurons)
        if sums is not None:
            weight_sum_SF, kept_SF = torch.zeros(2, sums.segments, neurons).unbind()
            segments = _segments(sums, blocks)
            inverse_T = torch.empty(rows) if sums.normalize else None
        scale_T1 = _column(scale_T)
        kept, weights = _scratch(2, blocks[0].stop, neurons)
        # Of the kept neurons; the backward pass reads them rather than compute them again.
        saving = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        activation_TF = torch.empty(rows, neurons) if saving else hidden_TF
        for block in blocks:
            hidden_BF, activation_BF = hidden_TF[block], activation_TF[block]
            torch.ops.aten.silu.out(gate_TF[block], out=activation_BF)
            weights_BF = weights[: len(hidden_BF)]
            if mask_TF is not None:
                mask_BF = mask_TF[block]
                kept_BF = kept[: len(hidden_BF)]
                if k is None:
                    _as_float(mask_BF, out=kept_BF)
                else:
                    torch.abs(activation_BF, out=weights_BF)
                    _select(weights_BF, k, kept_BF, mask_BF, kept_BF, no_signs=True)
                activation_BF.mul_(kept_BF)
            if segments is not None:
                assert weight_sum_SF is not None
                assert kept_SF is not None
                segments.add(block, kept_BF, None, kept_SF)
                torch.abs(activation_BF, out=weights_BF)
                inverse_B = None
                if inverse_T is not None:
                    inverse_B = torch.sum(weights_BF, dim=-1, out=inverse_T[block])
                    inverse_B.clamp_min_(TINY).reciprocal_()
                segments.add(block, weights_BF, inverse_B, weight_sum_SF)
            torch.mul(activation_BF, up_TF[block], out=hidden_BF)
            if scale_T1 is not None:
                hidden_BF.mul_(scale_T1[block])
        if kept_SF is not None:
            ctx.mark_non_differentiable(kept_SF)
        ctx.save_for_backward(
            gate_TF,
            up_TF,
            activation_TF if saving else None,  # type: ignore[arg-type]
            mask_TF,  # type: ignore[arg-type]
            scale_T,  # type: ignore[arg-type]
            inverse_T,  # type: ignore[arg-type]
        )
        ctx.set_materialize_grads(False)
        ctx.segments = segments  # type: ignore[attr-defined]
        ctx.blocks = blocks  # type: ignore[attr-defined]
        return hidden_TF, weight_sum_SF, kept_SF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_hidden_TF: Tensor | None,
        grad_sum_SF: Tensor | None,
        _: None,
    ) -> tuple[Tensor, Tensor, None, None, Tensor | None, None]:
        gate_TF, up_TF, activation_TF, mask_TF, scale_T, inverse_T = ctx.saved_tensors  # type: ignore[attr-defined]
        segments: _Segments | None = ctx.segments  # type: ignore[attr-defined]
        if grad_hidden_TF is None:
            grad_hidden_TF = torch.zeros_like(gate_TF)
        rows, neurons = gate_TF.shape
        # Halves of one matrix, as gate and up are.
        grad_gate_TF, grad_up_TF = torch.empty(rows, 2 * neurons).chunk(2, dim=-1)
        grad_scale_T = torch.empty(rows) if scale_T is not None else None
        scale_T1 = _column(scale_T)
        blocks: list[slice] = ctx.blocks  # type: ignore[attr-defined]
        sign, slope = _scratch(2, blocks[0].stop, neurons)
        for block in blocks:
            grad_BF, gate_BF, activation_BF = (
                tensor_TF[block] for tensor_TF in (grad_hidden_TF, gate_TF, activation_TF)
            )
            grad_gate_BF, grad_up_BF = grad_gate_TF[block], grad_up_TF[block]
            torch.mul(grad_BF, up_TF[block], out=grad_gate_BF)
            if grad_scale_T is not None:
                # d/d(scale) is the sum over neurons of d/d(a u) * a * u.
                torch.mul(grad_gate_BF, activation_BF, out=grad_up_BF)
                torch.sum(grad_up_BF, dim=-1, out=grad_scale_T[block])
            torch.mul(grad_BF, activation_BF, out=grad_up_BF)
            if scale_T1 is not None:
                grad_gate_BF.mul_(scale_T1[block])
                grad_up_BF.mul_(scale_T1[block])
            if grad_sum_SF is not None:
                assert segments is not None
                slope_BF = slope[: len(gate_BF)]
                inverse_B = None if inverse_T is None else inverse_T[block]
                _slopes(segments, block, activation_BF, grad_sum_SF, inverse_B, slope_BF)
                sign_BF = torch.sign(activation_BF, out=sign[: len(gate_BF)])
                grad_gate_BF.addcmul_(sign_BF, slope_BF)
            if mask_TF is not None:
                grad_gate_BF.mul_(_as_float(mask_TF[block], out=sign))
            torch.ops.aten.silu_backward.grad_input(grad_gate_BF, gate_BF, grad_input=grad_gate_BF)
        return grad_gate_TF, grad_up_TF, None, None, grad_scale_T, None


def _slopes(
    segments: _Segments,
    block: slice,
    activation_BF: Tensor,
    grad_sum_SF: Tensor,
    inverse_B: Tensor | None,
    slope_BF: Tensor,
) -> None:
    """Writes the gradient of each weight |a| that comes from the sums of weights.

    With w the weights of a row, s their sum and c the gradients of the sums of the row's segment,
    d/dw_j of sum_k c_k w_k / s is (c_j - sum_k c_k w_k / s) / s; the second term is zero where s is
    clamped.
    """
    if inverse_B is None:
        segments.spread(block, grad_sum_SF, None, slope_BF)
        return
    weights_BF = torch.abs(activation_BF, out=slope_BF)
    mean_B = segments.dots(block, grad_sum_SF, weights_BF)
    mean_B.mul_(inverse_B).mul_(inverse_B < 1 / TINY)
    segments.spread(block, grad_sum_SF, mean_B, slope_BF)
    slope_BF.mul_(inverse_B.unsqueeze(-1))


def _blocks(rows: int, neurons: int) -> list[slice]:
    """Returns all rows in their order, the first block the longest; no rows are one empty block."""
    step = _rows_in_block(neurons, torch.get_num_threads())
    return [slice(first, min(first + step, rows)) for first in range(0, max(rows, 1), step)]


def _column(values_T: Tensor | None) -> Tensor | None:
    return None if values_T is None else values_T.unsqueeze(-1)


def _as_float(mask_BF: Tensor, *, out: Tensor) -> Tensor:
    """Returns 0 and 1 in fp32, in the first rows of ``out``; of bytes, which convert fast."""
    return out[: len(mask_BF)].copy_(mask_BF.view(torch.uint8))
