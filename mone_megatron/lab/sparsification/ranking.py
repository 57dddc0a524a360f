"""Decides which neurons a token keeps: scores and masks of the rows of an MLP or all its experts.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, H hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mone_megatron.hf.experts_mone import ExpertRows
from mone_megatron.kernels.reference import topk_mask
from mone_megatron.lab.sparsification.plans import (
    BOTTOM_K,
    CONTRIBUTION,
    RANDOM,
    Choice,
    kept_neurons,
)
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
        down: computes the down projection ``[T, H]`` of ``[T, F]``; None where nobody needs it.
        routed: which expert and token the rows are of, and the router's weights; None for the rows
            of one MLP, a token each.
    """

    gate_TF: Tensor
    up_TF: Tensor
    hidden_TF: Tensor
    activate: Callable[[Tensor], Tensor] | None
    own_TF: Tensor | None
    column_norms: Callable[[], Tensor]
    down: Callable[[Tensor], Tensor] | None = None
    routed: ExpertRows | None = None

    @property
    def expert_T(self) -> Tensor:
        """Returns the expert of each row, int64 ``[T]``; zeros for one MLP."""
        if self.routed is not None:
            return self.routed.expert_T
        return torch.zeros(len(self.gate_TF), dtype=torch.int64, device=self.gate_TF.device)

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
    if score == CONTRIBUTION:
        wina_TF = score_rows("wina", rows)
        if rows.routed is None:
            return wina_TF
        return wina_TF * rows.routed.weight_T.abs().unsqueeze(-1)
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


class Cutter:
    """Keeps the neurons whose score is above a threshold, maybe none; see :data:`Choose`.

    What the model itself leaves out stays out.
    """

    def __init__(self, score: str, thresholds: Sequence[float]) -> None:
        """Holds the thresholds: one for all experts, or one for each of them."""
        self._score = score
        self._thresholds = tuple(thresholds)

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the mask of kept neurons, bool ``[T, F]``."""
        scores_TF = score_rows(self._score, rows)
        # In fp32, as they were counted.
        threshold_E = torch.tensor(self._thresholds, device=scores_TF.device)
        if len(threshold_E) > 1:
            kept_TF = scores_TF.float() > threshold_E[rows.expert_T].unsqueeze(-1)
        else:
            kept_TF = scores_TF.float() > threshold_E
        return kept_TF if rows.own_TF is None else kept_TF & rows.own_TF


class NeuronKeeper:
    """Keeps the same neurons of an expert for every token; see :data:`Choose`."""

    def __init__(self, kept: str, experts: int, neurons: int) -> None:
        """Unpacks what stays, as :class:`.plans.NeuronsGone` has it of one place."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(kept), dtype=np.uint8))
        kept_EF = bits[: experts * neurons].reshape(experts, neurons).astype(bool)
        self._kept_EF = torch.from_numpy(kept_EF)

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the mask of kept neurons, bool ``[T, F]``."""
        kept_TF = self._kept_EF.to(rows.gate_TF.device)[rows.expert_T]
        return kept_TF if rows.own_TF is None else kept_TF & rows.own_TF


def packed(kept_EF: Tensor) -> str:
    """Returns kept neurons, bool ``[E, F]``, as :class:`.plans.NeuronsGone` has them."""
    return np.packbits(kept_EF.cpu().numpy()).tobytes().hex()


class ExpertKeeper:
    """Checks that no token goes to an expert that is gone; see :data:`Choose`."""

    def __init__(self, gone: Sequence[int]) -> None:
        self._gone = tuple(gone)

    def __call__(self, rows: Rows) -> Tensor | None:
        """Keeps what the model keeps.

        Raises:
            ValueError: the router still chooses an expert that is gone.
        """
        assert rows.routed is not None, "only experts can be gone"
        gone_T = torch.isin(rows.expert_T, torch.tensor(self._gone, device=rows.expert_T.device))
        if bool((rows.routed.weight_T[gone_T] != 0).any()):
            raise ValueError(
                "--remove: this model's router chooses experts by more than their logits, so none "
                "can be taken out of it; leave reap, naee and super_experts out"
            )
        return rows.own_TF


def keep_all(rows: Rows) -> Tensor | None:
    """Keeps what the model keeps; see :data:`Choose`."""
    return rows.own_TF


@dataclass
class Tally:
    """Counts what was computed at a place.

    Attributes:
        rows: tokens, each once for each of its experts.
        computed: those of which an expert computed anything.
        kept: neurons that they kept.
        neurons: how many an expert has.
    """

    rows: int
    computed: int
    kept: int
    neurons: int

    def __add__(self, other: Tally) -> Tally:
        assert self.neurons == other.neurons, "of one place"
        return Tally(
            self.rows + other.rows,
            self.computed + other.computed,
            self.kept + other.kept,
            self.neurons,
        )


class Counted:
    """Counts what a choice keeps; it is a :data:`Choose` around another."""

    def __init__(self, choose: Choose, neurons: int) -> None:
        self._choose = choose
        self.tally = Tally(0, 0, 0, neurons)

    def __call__(self, rows: Rows) -> Tensor | None:
        """Returns what the choice says.

        Rows without a weight are of experts that a token was given and does not go to.
        """
        mask_TF = self._choose(rows)
        count, neurons = rows.gate_TF.shape
        active_T = None if rows.routed is None else rows.routed.weight_T != 0
        computed = count if active_T is None else int(active_T.sum())
        if mask_TF is None:
            kept = computed * neurons
        elif active_T is None:
            kept = int(mask_TF.sum())
        else:
            kept = int(mask_TF.sum(dim=-1)[active_T].sum())
        self.tally += Tally(count, computed, kept, neurons)
        return mask_TF
