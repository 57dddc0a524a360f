"""Defines what a hook is: it measures or watches a run, step by step.

The training loop computes a step and asks its hooks for everything else: the panel, evaluation, the
progress bar and saving are hooks, and so is what ``train.hooks`` names. It imports no torch, so
that names can be checked without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What metrics.jsonl holds of one step: numbers by name.
Record = dict[str, float]


@dataclass(frozen=True)
class StepReport:
    """Describes a step, the same on every rank.

    Attributes:
        step: the number of the step, from 1.
        seconds: how long it took by the clock, batches and update included.
        loss: mean next-token cross-entropy over the global batch, in nats.
        grad_norm: the norm of all gradients before clipping; NaN when the loss was refused.
        tokens: how many the run has trained on, this step included.
        skipped: how many steps of the run were not applied, this one included.
        fault: why this step was not applied; None when it was.
        stops: whether the run ends after this step because it was asked to.
        sums: what :meth:`Hook.reduce` of the hook that is asked gave, summed over all ranks: fp32,
            in the shapes that it gave, on the CPU.
        record: what is recorded of the step so far, by the loop and by the hooks before this one.
    """

    step: int
    seconds: float
    loss: float
    grad_norm: float
    tokens: int
    skipped: int
    fault: str | None
    stops: bool
    sums: Mapping[str, Tensor]
    record: Mapping[str, float]


class Hook:
    """Does nothing; a hook overrides what it needs. Methods are called in this order:

    ``on_start``; ``record_start`` and ``on_start_record`` when there is something to record before
    the first step (``train.eval_at_start``); then for every step ``before_step``, ``reduce``,
    ``record``, ``on_step`` and ``after_step``; and ``on_end``. A step that makes the run go back to
    a checkpoint (``train.on_bad_loss=rollback``) calls ``on_fault`` and ``on_rollback`` instead of
    the last three.
    """

    def on_start(self) -> None:
        """Is called before the first step."""

    def record_start(self) -> Record:
        """Returns what is recorded of the model before its first step, as step 0.

        Only a run that begins with step 1 and that ``train.eval_at_start`` asks for it calls this,
        on every rank.
        """
        return {}

    def on_start_record(self, record: Record) -> None:
        """Is called with the record of step 0, which has no loss, speed or learning rate."""

    def before_step(self, step: int) -> None:
        """Is called before a step (from 1) is computed."""

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns this rank's numbers by name, to be summed over all ranks.

        It is called when a step's backward passes are done. The sums travel with the loss, in the
        one collective of the step, and :meth:`record` is given them. Names and shapes are the same
        on every rank and in every step.
        """
        return {}

    def record(self, report: StepReport) -> Record:
        """Returns what is added to the record of the step, by the names of metrics.jsonl."""
        return {}

    def on_step(self, record: Record) -> None:
        """Is called with the whole record of a step (docs/metrics.md)."""

    def after_step(self, report: StepReport) -> None:
        """Is called when every hook has seen the record: here the run is saved."""

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Is told why a step was not applied, and what follows: ``skip`` or ``rollback``."""

    def on_rollback(self, step: int) -> None:
        """Is told that the state is that after ``step`` again: later records come anew."""

    def on_end(self, status: str) -> None:
        """Is called after the last step: ``completed``, ``interrupted`` or ``failed``."""

    def state(self) -> dict[str, Any]:
        """Returns what checkpoints hold of it: numbers, texts, lists and dictionaries of these.

        It is the same on every rank; the one of rank 0 is saved.
        """
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state` gave when the checkpoint was made."""


@dataclass(frozen=True)
class HookMethod:
    """Describes one hook that a configuration can name: ``train.hooks`` lists such names.

    Attributes:
        name: the hook's name in the configuration.
        formula: what it records, for tables.
        source: the paper or place that it comes from.
        make: makes the hook of a run from its :class:`mone_megatron.train.session.Session`
            (configuration, layout, device, model, optimizer), on every rank.
    """

    name: str
    formula: str
    source: str
    make: Callable[[Any], Hook]
