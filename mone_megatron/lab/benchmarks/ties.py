"""Counts what exact ties between scores do to the load of neurons, for every tie study.

Scores in bf16 have 8 bits, so several neurons of a token often share the score at the threshold
and the tie rule decides which of them are kept. :class:`TieCounter` chooses with a rule of its own
and counts what ties decided, beside the load that a rule without a preference would give.

Shape suffixes: T tokens (rows), F neurons of one expert, E experts, B parts of the index range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mone_megatron.kernels.reference import topk_mask

TieOrder = Literal["lowest", "highest", "random"]
# Parts of the index range that the load is averaged over.
_MOST_PARTS = 16


@dataclass(frozen=True)
class TieStatistics:
    """Holds what ties decided in one model, over all its experts that selected neurons.

    Attributes:
        order: which of equal neurons was kept: ``lowest`` index (the method's rule), ``highest``
            index, or ``random`` for each token.
        rows: tokens, each counted once for every expert that it is routed to.
        neurons: F.
        kept: K.
        rows_decided_by_ties: share of the rows in which more neurons shared the score of the
            threshold than there was room for.
        tied: mean number of neurons of a row that share the score at the threshold.
        dropped: mean number of them that the tie rule left out.
        load_over_parts: ``[B]``, the load of the neurons of each of up to 16 equal parts of the
            index range, lowest indices first, over the mean load.
        bias_over_parts: ``[B]``, how far the tie rule moved that load from the one in which every
            tied neuron is kept equally often, over the mean load. It is exact, not an estimate:
            both are counted on the same scores.
        correlation: of load and index, the mean over experts; None where a load does not vary.
        dead_share: share of the neurons that no row kept, the mean over the experts with rows.
        entropy: of the load over log F, likewise.
    """

    order: TieOrder
    rows: int
    neurons: int
    kept: int
    rows_decided_by_ties: float
    tied: float
    dropped: float
    load_over_parts: tuple[float, ...]
    bias_over_parts: tuple[float, ...]
    correlation: float | None
    dead_share: float
    entropy: float

    @property
    def first_over_last(self) -> float:
        """Returns how much more load ties gave the first part than the last, over the mean."""
        return self.bias_over_parts[0] - self.bias_over_parts[-1]


@dataclass(frozen=True)
class TieWay:
    """Holds a dtype and a tie order to train or to run a model with."""

    dtype: Literal["fp32", "bf16"]
    order: TieOrder

    @classmethod
    def all_of(cls, orders: Sequence[TieOrder], *, fp32: bool) -> list[TieWay]:
        """Returns bf16 with each order; with ``fp32`` also fp32, where hardly anything ties."""
        ways = [cls("bf16", order) for order in orders]
        return [*ways, cls("fp32", "lowest")] if fp32 else ways

    def __str__(self) -> str:
        return f"{self.dtype}, {self.order}"


def mask_with_order(
    scores_TF: Tensor, k: int, order: TieOrder, generator: torch.Generator | None = None
) -> Tensor:
    """Returns the mask of the ``k`` largest scores of each row, ties broken by ``order``.

    Args:
        scores_TF: any floating dtype.
        k: 1 to F.
        order: see :class:`TieStatistics`.
        generator: of the random order.

    Raises:
        ValueError: for an unknown order.
    """
    if order == "lowest":
        return topk_mask(scores_TF, k)
    if order == "highest":
        return topk_mask(scores_TF.flip(-1), k).flip(-1)
    if order == "random":
        noise_TF = torch.rand(scores_TF.shape, generator=generator, device=scores_TF.device)
        shuffled_TF = noise_TF.argsort(dim=-1)
        mask_TF = topk_mask(scores_TF.gather(-1, shuffled_TF), k)
        return torch.empty_like(mask_TF).scatter_(-1, shuffled_TF, mask_TF)
    raise ValueError(f"the tie order {order!r} is unknown")


class TieCounter:
    """Chooses the neurons of one layer's experts by a tie order, and counts what ties decided."""

    def __init__(self, order: TieOrder, neurons: int, kept: int, experts: int, seed: int) -> None:
        """Starts with nothing counted.

        Args:
            order: which of equal neurons is kept.
            neurons: F.
            kept: K.
            experts: E, the experts that the rows belong to.
            seed: of the random order.
        """
        self.order, self.neurons, self.kept = order, neurons, kept
        # A row's mask is chosen with this while nothing is counted, too.
        self.counting = False
        self._generator = torch.Generator().manual_seed(seed)
        self._rows_E = torch.zeros(experts, dtype=torch.float64)
        self._load_EF = torch.zeros(experts, neurons, dtype=torch.float64)
        self._fair_EF = torch.zeros(experts, neurons, dtype=torch.float64)
        self._decided = self._tied = self._dropped = 0.0

    @torch.no_grad()
    def choose(self, scores_TF: Tensor, expert_T: Tensor | None = None) -> Tensor:
        """Returns the mask of kept neurons, ``[T, F]`` bool.

        Args:
            scores_TF: as the model computes them, in its dtype.
            expert_T: int64, the expert of each row; None when there is one.
        """
        mask_TF = mask_with_order(scores_TF, self.kept, self.order, self._generator)
        if self.counting and len(scores_TF):
            self._count(scores_TF, mask_TF, expert_T)
        return mask_TF

    def _count(self, scores_TF: Tensor, mask_TF: Tensor, expert_T: Tensor | None) -> None:
        threshold_T1 = scores_TF.where(mask_TF, torch.inf).amin(dim=-1, keepdim=True)
        tied_TF = scores_TF == threshold_T1
        above_TF = scores_TF > threshold_T1
        tied_T1 = tied_TF.sum(dim=-1, keepdim=True).double()
        room_T1 = self.kept - above_TF.sum(dim=-1, keepdim=True).double()
        fair_TF = above_TF.double() + tied_TF.double() * (room_T1 / tied_T1.clamp_min(1))
        if expert_T is None:
            expert_T = torch.zeros(len(scores_TF), dtype=torch.int64)
        self._rows_E += torch.bincount(expert_T, minlength=len(self._rows_E)).double()
        self._load_EF.index_add_(0, expert_T, mask_TF.double())
        self._fair_EF.index_add_(0, expert_T, fair_TF)
        self._decided += float((tied_T1 > room_T1).sum())
        self._tied += float(tied_T1.sum())
        self._dropped += float((tied_T1 - room_T1).sum())


def tie_statistics(counters: Sequence[TieCounter]) -> TieStatistics:
    """Returns the statistics of all layers together.

    Args:
        counters: of layers of one shape, chosen by one order; at least one.

    Raises:
        ValueError: nothing was counted.
    """
    one = counters[0]
    assert all((c.order, c.neurons, c.kept) == (one.order, one.neurons, one.kept) for c in counters)
    rows_E = torch.cat([counter._rows_E for counter in counters])
    rows = int(rows_E.sum())
    if not rows:
        raise ValueError("no token reached an expert that selects neurons, so no tie was counted")
    # An expert without tokens has no load to speak of.
    used_E = rows_E > 0
    load_EF = torch.cat([counter._load_EF for counter in counters])[used_E]
    fair_EF = torch.cat([counter._fair_EF for counter in counters])[used_E]
    mean = rows * one.kept / one.neurons
    share_EF = load_EF / load_EF.sum(dim=-1, keepdim=True)
    entropy_E = -torch.xlogy(share_EF, share_EF).sum(dim=-1)
    log_neurons = torch.tensor(float(max(one.neurons, 2))).log().double()
    return TieStatistics(
        order=one.order,
        rows=rows,
        neurons=one.neurons,
        kept=one.kept,
        rows_decided_by_ties=sum(counter._decided for counter in counters) / rows,
        tied=sum(counter._tied for counter in counters) / rows,
        dropped=sum(counter._dropped for counter in counters) / rows,
        load_over_parts=_over_parts(load_EF.sum(dim=0) / mean),
        bias_over_parts=_over_parts((load_EF - fair_EF).sum(dim=0) / mean),
        correlation=_correlation_with_index(load_EF),
        dead_share=float((load_EF == 0).double().mean()),
        entropy=float((entropy_E / log_neurons).mean()),
    )


def _over_parts(values_F: Tensor) -> tuple[float, ...]:
    return tuple(
        float(part.mean()) for part in values_F.tensor_split(min(_MOST_PARTS, len(values_F)))
    )


def _correlation_with_index(load_EF: Tensor) -> float | None:
    centred_EF = load_EF - load_EF.mean(dim=-1, keepdim=True)
    index_F = torch.arange(load_EF.shape[-1], dtype=torch.float64)
    index_F -= index_F.mean()
    scale_E = centred_EF.norm(dim=-1) * index_F.norm()
    varying_E = scale_E > 0
    if not varying_E.any():
        return None
    return float((centred_EF @ index_F)[varying_E].div(scale_E[varying_E]).mean())
