"""Times our exact top-k mask against what torch offers, over a grid of rows and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels.ops import topk_mask
from mone_megatron.lab.benchmarks.measure import Spread, finished, interleave, ratio

_CALLS_ON_GPU = 20


@dataclass(frozen=True)
class SelectCost:
    """Holds one cell of the grid. Ratios above 1 say that ours is faster."""

    rows: int
    neurons: int
    kept: int
    ours_milliseconds: Spread
    topk_scatter_over_ours: Spread
    kthvalue_over_ours: Spread


def topk_scatter(scores_TF: Tensor, k: int) -> Tensor:
    """Returns the usual mask: ``torch.topk``, then True at its indices.

    Ties go to whichever ``torch.topk`` returns.
    """
    indices_TK = scores_TF.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(scores_TF, dtype=torch.bool).scatter_(-1, indices_TK, True)


def kthvalue_mask(scores_TF: Tensor, k: int) -> Tensor:
    """Returns the mask by the threshold of ``torch.kthvalue``: more than k where scores tie."""
    kth_T1 = scores_TF.kthvalue(scores_TF.shape[-1] - k + 1, dim=-1, keepdim=True).values
    return scores_TF >= kth_T1


def measure_select(
    rows: Sequence[int],
    neurons: Sequence[int],
    keep_ratio: float,
    *,
    repeats: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[SelectCost]:
    """Times the masks of random |SiLU| scores, interleaved.

    Args:
        rows: numbers of rows of the grid.
        neurons: numbers of neurons of the grid.
        keep_ratio: k is this share of the neurons, at least 1.
        repeats: measurements of each.
        device: where; None is the CPU. On a GPU a measurement is several calls and one wait.
        dtype: of the scores.

    Raises:
        ValueError: for a size below 1 or a ratio outside (0, 1].
    """
    if min(*rows, *neurons) < 1 or not 0 < keep_ratio <= 1:
        raise ValueError("--rows and --neurons must be 1 or more, --keep-ratio in (0, 1]")
    place = device or torch.device("cpu")
    return [
        _cell(torch.randn(t, f, device=place, dtype=dtype), max(1, round(keep_ratio * f)), repeats)
        for t in rows
        for f in neurons
    ]


def _cell(gate_TF: Tensor, kept: int, repeats: int) -> SelectCost:
    scores_TF = F.silu(gate_TF).abs()
    rows, neurons = scores_TF.shape
    assert int(topk_mask(scores_TF, kept).sum()) == kept * rows
    rivals = {"ours": topk_mask, "topk": topk_scatter, "kthvalue": kthvalue_mask}
    calls = _CALLS_ON_GPU if scores_TF.is_cuda else 1
    actions = {
        name: finished(partial(mask, scores_TF, kept), scores_TF.device, calls=calls)
        for name, mask in rivals.items()
    }
    seconds = interleave(actions, repeats=repeats, warmup=2).clock
    return SelectCost(
        rows=rows,
        neurons=neurons,
        kept=kept,
        ours_milliseconds=Spread.of([1e3 * once / calls for once in seconds["ours"]]),
        topk_scatter_over_ours=ratio(seconds, "topk", "ours"),
        kthvalue_over_ours=ratio(seconds, "kthvalue", "ours"),
    )
