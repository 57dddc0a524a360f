"""Defines neuron selection in plain eager torch; every fast path is tested against it.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, K kept neurons, S segments
of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.methods.scores import SCORES

Activate = Callable[[Tensor], Tensor]

# Divisors are not smaller: the smallest normal number of fp32.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TopK:
    """Keeps the k neurons of each row whose score is largest, ties to the lowest index.

    Attributes:
        k: how many neurons are kept, from 1 to F.
        score: a name in :data:`mone_megatron.methods.scores.SCORES`, of a score that reads nothing
            but gate and up projections.
    """

    k: int
    score: str

    def __post_init__(self) -> None:
        """Asserts that a kernel has all that the score reads."""
        reads = SCORES[self.score].reads
        assert "down_norm" not in reads, f"no kernel has what the score {self.score} reads"


# Which neurons each row keeps: [T, F] bool, a rule to choose them by, or None for all.
Keep = Tensor | TopK | None


@dataclass
class Packed:
    """Asks one call to save only what the kept neurons need in the backward pass.

    Attributes:
        width: the largest number of neurons that a row keeps.
        rebuild: filled in by the call when something is saved: gives the hidden values again, from
            what is saved, so that whoever needs them in the backward pass need not keep them.
    """

    width: int
    rebuild: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class WeightSums:
    """Asks for sums of the neurons' weights over groups of rows: what the balance loss is made of.

    Attributes:
        segment_T: int64, the segment of each row.
        segments: S, the number of segments.
        weights: |a| at the kept neurons and 0 at others, or |a| at all.
        normalize: divide the weights of each row by their sum.
        in_order: whether ``segment_T`` never decreases.
        differentiable: whether a loss is made of them; sums that are only counted keep nothing for
            a backward pass.
    """

    segment_T: Tensor
    segments: int
    weights: Literal["selected", "all"] = "selected"
    normalize: bool = True
    in_order: bool = False
    differentiable: bool = True


def neuron_scores(
    gate_TF: Tensor,
    up_TF: Tensor,
    score: str,
    activate: Activate = F.silu,
    *,
    down_norm_TF: Tensor | None = None,
) -> Tensor:
    """Returns what ranks the neurons of a token; larger is kept first.

    Args:
        gate_TF: gate projections ``g = x Wg``.
        up_TF: up projections ``u = x Wu``, for scores that read them.
        score: a name in :data:`mone_megatron.methods.scores.SCORES`.
        activate: the function that gives the activation a of the gate projection g.
        down_norm_TF: the norm of each neuron's row of the down projection, broadcasting to
            ``[T, F]``, for scores that read it.

    Returns:
        Scores of the shape of ``gate_TF``, in its dtype or in fp32.

    Raises:
        ValueError: for an unknown score.
    """
    return SCORES[score].of(
        gate_TF=gate_TF, up_TF=up_TF, activate=activate, down_norm_TF=down_norm_TF
    )


def topk_mask(scores_TF: Tensor, k: int) -> Tensor:
    """Returns True at the ``k`` largest scores of every row, ties to the lowest index.

    Exactly ``k`` entries of a row are True, whatever the dtype (bf16 scores tie in a large share
    of rows). A row that holds a NaN has no largest scores: none of it is True, and the NaN
    spreads because unselected entries are multiplied by zero rather than overwritten.

    Args:
        scores_TF: the score of each neuron, in any floating dtype.
        k: how many are kept, from 1 to F.

    Returns:
        Bool tensor of the shape of ``scores_TF``.
    """
    # A NaN is among the largest to topk, and amin passes it on: nothing compares with it.
    kth_T1 = scores_TF.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return mask_at_threshold(scores_TF, kth_T1, k)


def mask_at_threshold(scores_TF: Tensor, kth_T1: Tensor, k: int) -> Tensor:
    """Returns :func:`topk_mask` when the k-th largest score of each row is known."""
    above_TF = scores_TF > kth_T1
    tied_TF = scores_TF == kth_T1
    room_T1 = k - above_TF.sum(dim=-1, keepdim=True)
    return above_TF | (tied_TF & (tied_TF.cumsum(dim=-1) <= room_T1))


def kept_mask(gate_TF: Tensor, up_TF: Tensor, keep: Keep, activate: Activate) -> Tensor | None:
    """Returns the mask that ``keep`` stands for, without gradients."""
    if not isinstance(keep, TopK):
        return keep
    with torch.no_grad():
        return topk_mask(neuron_scores(gate_TF, up_TF, keep.score, activate), keep.k)


def selected_glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    mask_TF: Tensor | None,
    scale_T: Tensor | None,
    activate: Activate = F.silu,
) -> Tensor:
    """Returns ``a * u`` at the selected neurons, times the router's weight of a row.

    Args:
        gate_TF: gate projections.
        up_TF: up projections.
        mask_TF: bool, True at kept neurons; None keeps all.
        scale_T: one factor per row (the router's probability); None for 1.
        activate: the function that gives the activation a of the gate projection g.

    Returns:
        The input of the down projection, in the dtype of ``gate_TF``. Gradients flow through the
        kept entries only.
    """
    hidden_TF = activate(gate_TF) * up_TF
    if mask_TF is not None:
        hidden_TF = hidden_TF * mask_TF
    if scale_T is not None:
        hidden_TF = hidden_TF * scale_T.unsqueeze(-1)
    return hidden_TF.to(gate_TF.dtype)


def segment_matrix(segment_T: Tensor, segments: int) -> Tensor:
    """Returns fp32 ``[S, T]``, 1 where row t is of segment s: sums over segments are matmuls."""
    index_S1 = torch.arange(segments, device=segment_T.device).unsqueeze(-1)
    return (segment_T.unsqueeze(0) == index_S1).float()


def weight_sums(
    gate_TF: Tensor, mask_TF: Tensor, sums: WeightSums, activate: Activate = F.silu
) -> tuple[Tensor, Tensor]:
    """Returns the sums that are asked for, and how many rows of each segment keep each neuron.

    Args:
        gate_TF: gate projections, of all neurons of the expert.
        mask_TF: bool, True at kept neurons.
        sums: what is to be summed, and over which rows.
        activate: the function that gives the activation a of the gate projection g.

    Returns:
        ``[S, F]`` fp32 each. Gradients flow through the first, if they are asked for.
    """
    segment_ST = segment_matrix(sums.segment_T, sums.segments)
    with torch.set_grad_enabled(torch.is_grad_enabled() and sums.differentiable):
        weights_TF = activate(gate_TF).float().abs()
        if sums.weights == "selected":
            weights_TF = weights_TF * mask_TF
        if sums.normalize:
            weights_TF = weights_TF / weights_TF.sum(dim=-1, keepdim=True).clamp_min(TINY)
        weight_sum_SF = segment_ST @ weights_TF
    return weight_sum_SF, segment_ST @ mask_TF.float()
