"""The fast paths on CPU in fp32: the top-k mask, and SwiGLU with selection in one function.

The k-th largest score comes from numpy's vectorised partial sort (4 to 5 times faster than
``torch.topk`` for rows of a few hundred), and one autograd function takes a block of rows through
all operations of SwiGLU while they are in the cache. docs/performance.md has the figures.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows; B a block
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import reference
from mone_megatron.kernels.reference import TINY, Activate, WeightSums

# Elements a thread works on at a time: a few fp32 tensors of this size share a core's L2 cache.
_BLOCK_ELEMENTS = 65536


def _rows_in_block(neurons: int, threads: int) -> int:
    return max(1, _BLOCK_ELEMENTS * threads // neurons)


def supports(*tensors: Tensor | None, activate: Activate, sums: WeightSums | None) -> bool:
    """Whether :func:`selected_swiglu` can do it: fp32, SiLU, weights of selected neurons."""
    return (
        activate is F.silu
        and (sums is None or sums.weights == "selected")
        and all(tensor is None or tensor.dtype is torch.float32 for tensor in tensors)
    )


def topk_mask(scores_TF: Tensor, k: int) -> Tensor:
    """See :func:`mone_megatron.kernels.reference.topk_mask`; the same mask, bit for bit."""
    if scores_TF.shape[0] == 0:
        return reference.topk_mask(scores_TF, k)
    scores_TF = scores_TF.detach().float()
    rows, neurons = scores_TF.shape
    scores = scores_TF.numpy()
    mask = np.empty((rows, neurons), dtype=bool)
    kth = np.empty((rows, 1), dtype=np.float32)
    step = _rows_in_block(neurons, threads=1)
    scratch = np.empty((min(step, rows), neurons), dtype=np.float32)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        ordered = scratch[: len(scores[block])]
        np.copyto(ordered, scores[block])
        ordered.partition(neurons - k, axis=-1)
        kth[block] = ordered[:, neurons - k : neurons - k + 1]
        np.greater_equal(scores[block], kth[block], out=mask[block])
    mask_TF = torch.from_numpy(mask)
    # A NaN is the largest score to numpy, so ties may hide it in the count; the sum shows it.
    if np.count_nonzero(mask) == k * rows and not scores_TF.sum().isnan():
        return mask_TF
    # Some row ties at its threshold, or holds NaN: mend those rows only.
    nan_T1 = scores_TF.isnan().any(dim=-1, keepdim=True)
    kth_T1 = torch.from_numpy(kth).masked_fill(nan_T1, torch.nan)
    odd = (mask_TF.sum(dim=-1, keepdim=True).ne(k) | nan_T1).squeeze(-1).nonzero().squeeze(-1)
    mask_TF[odd] = reference.mask_at_threshold(scores_TF[odd], kth_T1[odd], k)
    return mask_TF


def selected_swiglu(
    gate_TF: Tensor,
    up_TF: Tensor,
    scale_T: Tensor | None,
    mask_TF: Tensor | None,
    sums: WeightSums | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden values, and with ``sums`` the sums of weights and the counts (see :mod:`.ops`)."""
    segment_ST, normalize = None, False
    if sums is not None:
        segment_ST = reference.segment_matrix(sums.segment_T, sums.segments)
        normalize = sums.normalize
    outputs: tuple[Tensor, Tensor | None, Tensor | None] = _SelectedSwiGLU.apply(
        gate_TF, up_TF, mask_TF, scale_T, segment_ST, normalize
    )
    return outputs


class _SelectedSwiGLU(torch.autograd.Function):
    """SwiGLU at the selected neurons; with ``segment_ST`` also the sums of their weights.

    Unselected entries are multiplied by zero, so that NaN spreads. Temporaries are allocated once
    for all blocks: fresh memory costs more than the arithmetic on it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate_TF: Tensor,
        up_TF: Tensor,
        mask_TF: Tensor | None,
        scale_T: Tensor | None,
        segment_ST: Tensor | None,
        normalize: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, neurons = gate_TF.shape
        hidden_TF = torch.empty(rows, neurons)
        weights_TF = segment_TS = share_ST = weight_sum_SF = kept_SF = None
        if segment_ST is not None:
            weights_TF = torch.empty(rows, neurons)
            kept_SF = torch.zeros(segment_ST.shape[0], neurons)
            segment_TS = segment_ST.T
        step = _rows_in_block(neurons, torch.get_num_threads())
        kept = torch.empty(min(step, rows), neurons)
        for gate_BF, up_BF, mask_BF, scale_B1, hidden_BF, weights_BF, segment_BS in _blocks(
            step, gate_TF, up_TF, mask_TF, _column(scale_T), hidden_TF, weights_TF, segment_TS
        ):
            torch.ops.aten.silu.out(gate_BF, out=hidden_BF)
            if mask_BF is not None:
                kept_BF = _as_float(mask_BF, out=kept)
                hidden_BF.mul_(kept_BF)
            if weights_BF is not None:
                torch.abs(hidden_BF, out=weights_BF)
                assert kept_SF is not None
                kept_SF.addmm_(segment_BS.T, kept_BF)
            hidden_BF.mul_(up_BF)
            if scale_B1 is not None:
                hidden_BF.mul_(scale_B1)
        if segment_ST is not None and weights_TF is not None and kept_SF is not None:
            share_ST = segment_ST
            if normalize:
                share_ST = segment_ST / weights_TF.sum(dim=-1).clamp_min_(TINY)
            weight_sum_SF = share_ST @ weights_TF
            ctx.mark_non_differentiable(kept_SF)
        ctx.save_for_backward(
            gate_TF,
            up_TF,
            mask_TF,  # type: ignore[arg-type]
            scale_T,  # type: ignore[arg-type]
            weights_TF,  # type: ignore[arg-type]
            share_ST,  # type: ignore[arg-type]
        )
        ctx.set_materialize_grads(False)
        ctx.normalize = normalize  # type: ignore[attr-defined]
        return hidden_TF, weight_sum_SF, kept_SF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_hidden_TF: Tensor | None,
        grad_sum_SF: Tensor | None,
        _: None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None, None, None]:
        gate_TF, up_TF, mask_TF, scale_T, weights_TF, share_ST = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad_hidden_TF is None:
            grad_hidden_TF = torch.zeros_like(gate_TF)
        share_TS = mean_T = None
        if grad_sum_SF is not None:
            share_TS = share_ST.T
            if ctx.normalize:  # type: ignore[attr-defined]
                mean_T = _mean_gradient(weights_TF, share_ST, grad_sum_SF)
        rows, neurons = gate_TF.shape
        grad_gate_TF, grad_up_TF = torch.empty(2, rows, neurons)
        grad_scale_T = torch.empty(rows) if scale_T is not None else None
        step = _rows_in_block(neurons, torch.get_num_threads())
        activation, kept, slope = torch.empty(3, min(step, rows), neurons)
        for (
            (grad_BF, gate_BF, up_BF, mask_BF, scale_B1),
            (grad_gate_BF, grad_up_BF, grad_scale_B),
            (share_BS, mean_B1),
        ) in zip(
            _blocks(step, grad_hidden_TF, gate_TF, up_TF, mask_TF, _column(scale_T)),
            _blocks(step, grad_gate_TF, grad_up_TF, grad_scale_T),
            _blocks(step, share_TS, _column(mean_T), rows=rows),
            strict=True,
        ):
            activation_BF = torch.ops.aten.silu.out(gate_BF, out=activation[: len(gate_BF)])
            if mask_BF is not None:
                kept_BF = _as_float(mask_BF, out=kept)
                activation_BF.mul_(kept_BF)
            torch.mul(grad_BF, up_BF, out=grad_gate_BF)
            if scale_B1 is not None:
                # d/d(scale) is the sum over neurons of d/d(a u) * a * u.
                torch.mul(grad_gate_BF, activation_BF, out=grad_up_BF)
                torch.sum(grad_up_BF, dim=-1, out=grad_scale_B)
            torch.mul(grad_BF, activation_BF, out=grad_up_BF)
            if scale_B1 is not None:
                grad_gate_BF.mul_(scale_B1)
                grad_up_BF.mul_(scale_B1)
            if share_BS is not None:
                assert grad_sum_SF is not None
                slope_BF = torch.mm(share_BS, grad_sum_SF, out=slope[: len(gate_BF)])
                if mean_B1 is not None:
                    slope_BF.sub_(mean_B1)
                grad_gate_BF.addcmul_(activation_BF.sign_(), slope_BF)
            if mask_BF is not None:
                grad_gate_BF.mul_(kept_BF)
            torch.ops.aten.silu_backward.grad_input(grad_gate_BF, gate_BF, grad_input=grad_gate_BF)
        return grad_gate_TF, grad_up_TF, None, grad_scale_T, None, None


def _mean_gradient(weights_TF: Tensor, share_ST: Tensor, grad_sum_SF: Tensor) -> Tensor:
    """What normalisation takes from the gradient of each weight of a row, ``[T]``.

    With w the weights, s their sum and c their gradients, d/dw_j of sum_k c_k w_k / s is
    (c_j - sum_k c_k w_k / s) / s: this is the second term. It is zero where s is clamped.
    """
    inverse_T = share_ST.sum(dim=0)
    mean_T = (share_ST * (grad_sum_SF @ weights_TF.T)).sum(dim=0)
    return mean_T * inverse_T * (inverse_T < 1 / TINY)


def _blocks(
    step: int, *tensors: Tensor | None, rows: int | None = None
) -> Iterator[tuple[Any, ...]]:
    """The same ``step`` rows of every tensor, block after block; None stays None.

    ``rows`` tells how many there are where the first tensor may be None.
    """
    if rows is None:
        assert tensors[0] is not None
        rows = len(tensors[0])
    # As Tensor.split: no rows are one empty block.
    count = max(1, -(-rows // step))
    columns = [[None] * count if tensor is None else tensor.split(step) for tensor in tensors]
    return zip(*columns, strict=True)


def _column(values_T: Tensor | None) -> Tensor | None:
    return None if values_T is None else values_T.unsqueeze(-1)


def _as_float(mask_BF: Tensor, *, out: Tensor) -> Tensor:
    """0 and 1 in fp32, in the first rows of ``out``; torch converts bytes faster than bools."""
    return out[: len(mask_BF)].copy_(mask_BF.view(torch.uint8))
