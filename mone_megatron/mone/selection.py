"""Which neurons a token keeps: exactly K of an expert's f, also when f is spread over ranks.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, C candidates of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import Activate, Score, TopK, neuron_scores


@dataclass(frozen=True)
class NeuronSelection:
    """How neurons are chosen (design: "The method")."""

    keep_ratio: float
    score: Score = "abs_activation"

    def kept(self, neurons: int) -> int:
        """K = round(keep_ratio * f), with f = ``neurons``.

        Raises:
            ValueError: when the ratio keeps no neuron, or is above 1.
        """
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"mone.keep_ratio: {self.keep_ratio} is not in (0, 1]")
        kept = round(self.keep_ratio * neurons)
        if kept < 1:
            raise ValueError(
                f"mone.keep_ratio: {self.keep_ratio} of {neurons} neurons keeps none; "
                f"use at least {1 / neurons:.3g}"
            )
        return kept


def sharded_topk_mask(scores_TF: Tensor, k: int, group: dist.ProcessGroup) -> Tensor:
    """:func:`~mone_megatron.kernels.reference.topk_mask` over rows that lie on several ranks.

    Rank r of ``group`` holds neurons ``r*F .. (r+1)*F`` of every row. Any of the K largest of a
    whole row is among the K largest of its rank, so ``min(k, F)`` candidates a rank decide the
    threshold exactly, and how many ties each rank may take.

    Returns:
        This rank's part of the mask, ``[T, F]`` bool. Collective over ``group``.
    """
    candidates_TC = scores_TF.detach().topk(min(k, scores_TF.shape[-1]), dim=-1).values
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered = [torch.empty_like(candidates_TC) for _ in range(size)]
    dist.all_gather(gathered, candidates_TC.contiguous(), group=group)
    kth_T1 = torch.cat(gathered, dim=-1).topk(k, dim=-1).values.amin(dim=-1, keepdim=True)
    above_T1 = torch.stack([(part > kth_T1).sum(dim=-1, keepdim=True) for part in gathered]).sum(0)
    ties_before_T1 = torch.zeros_like(above_T1)
    for part in gathered[:rank]:
        ties_before_T1 += (part == kth_T1).sum(dim=-1, keepdim=True)
    room_T1 = k - above_T1 - ties_before_T1
    tied_TF = scores_TF == kth_T1
    return (scores_TF > kth_T1) | (tied_TF & (tied_TF.cumsum(dim=-1) <= room_T1))


class NeuronTopK(nn.Module):
    """Chooses the kept neurons of each row. A module so that forward hooks can read the mask."""

    def __init__(
        self,
        selection: NeuronSelection,
        neurons: int,
        group: dist.ProcessGroup | None = None,
        activate: Activate = F.silu,
    ) -> None:
        """Prepare to select among ``neurons`` (f of the whole expert, over all of ``group``).

        Args:
            selection: keep ratio and score.
            neurons: f.
            group: the ranks that share the neurons of one expert, in neuron order; None or a
                group of one when this rank holds them all.
            activate: the activation of the gate projection.
        """
        super().__init__()
        self.selection = selection
        self.neurons = neurons
        self.activate = activate
        self.kept = selection.kept(neurons)
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Keep another share of the neurons from now on (``mone.keep_ratio_schedule``)."""
        self.selection = replace(self.selection, keep_ratio=keep_ratio)
        self.kept = self.selection.kept(self.neurons)

    @property
    def rule(self) -> TopK | None:
        """The selection as a rule for a kernel to apply; None when it needs other ranks."""
        return None if self.group is not None else TopK(self.kept, self.selection.score)

    @property
    def watched(self) -> bool:
        """Whether a forward hook wants to see the mask."""
        return bool(self._forward_hooks)

    @torch.no_grad()
    def forward(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """The mask of kept neurons, ``[T, F]`` bool; over ``group`` exactly K True a row."""
        scores_TF = neuron_scores(gate_TF, up_TF, self.selection.score, self.activate)
        if self.group is None:
            return ops.topk_mask(scores_TF, self.kept)
        return sharded_topk_mask(scores_TF, self.kept, self.group)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"keep {self.kept} of {self.neurons} by {self.selection.score}"
