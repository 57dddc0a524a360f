"""Decides which neurons a token keeps: scores and masks of the rows of an MLP or all its experts.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mone_megatron.kernels.reference import topk_mask
from mone_megatron.lab.sparsification.plans import BOTTOM_K, RANDOM, Choice, kept_neurons
from mone_megatron.methods.scores import SCORES


@dataclass(frozen=True)
class Rows:
    """Holds some rows as an MLP computes them.

    Attributes:
        gate_TF: gate projections g.
        up_TF: up projections u.
        hidden_TF: a * u of all neurons, before anything is pruned.
        activate: a as a function of g; None when the experts have a gate of their own.
        own_TF: bool, what the model itself keeps; None for all.
        column_norms: computes the Euclidean norm of each neuron's column of the down projection:
            ``[T, F]`` or ``[1, F]``.
    """

    gate_TF: Tensor
    up_TF: Tensor
    hidden_TF: Tensor
    activate: Callable[[Tensor], Tensor] | None
    own_TF: Tensor | None
    column_norms: Callable[[], Tensor]

    @property
    def magnitude_TF(self) -> Tensor:
        """Returns |a|, ``[T, F]``; only places that define it have one."""
        assert self.activate is not None, "refused when the places were found"
        return self.activate(self.gate_TF).abs()


# Looks at rows; returns the neurons to keep (bool [T, F]), or None for all.
Choose = Callable[[Rows], Tensor | None]


def score_rows(score: str, rows: Rows, generator: torch.Generator | None = None) -> Tensor:
    """Returns the scores by which neurons are ranked, ``[T, F]``.

    Raises:
        ValueError: an unknown score.
    """
    if score == RANDOM:
        gate_TF = rows.gate_TF
        return torch.rand(gate_TF.shape, generator=generator, device=gate_TF.device)
    if score == BOTTOM_K:
        return -rows.magnitude_TF
    named = SCORES[score]
    return named.of(
        gate_TF=rows.gate_TF,
        up_TF=rows.up_TF,
        activate=rows.activate,
        product_TF=rows.hidden_TF,
        down_norm_TF=rows.column_norms() if "down_norm" in named.reads else None,
    )


class Pruner:
    """Keeps the neurons with the largest scores; see :data:`Choose`.

    What the model itself leaves out goes first, so pruning never brings a neuron back. Random
    scores are drawn in the order of the rows, from a stream of the pruner's own.
    """

    def __init__(self, choice: Choice, *, seed: int) -> None:
        self._choice = choice
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the mask of kept neurons, bool ``[T, F]``."""
        if self._generator is None:
            self._generator = torch.Generator(rows.gate_TF.device).manual_seed(self._seed)
        scores_TF = score_rows(self._choice.score, rows, self._generator)
        if rows.own_TF is not None:
            scores_TF = scores_TF.masked_fill(~rows.own_TF, -torch.inf)
        kept = kept_neurons(self._choice.share, scores_TF.shape[-1])
        return topk_mask(scores_TF, kept)
