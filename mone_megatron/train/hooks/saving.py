"""Saving the run: every ``checkpoint.interval`` steps, at the end and when it is stopped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.train.hooks.due import is_due
from mone_megatron.train.resume.checkpointer import Checkpointer, Position
from mone_megatron.train.step import Stepper


class SavingHook(Hook):
    """Saves after the other hooks have seen a step, so that their files reach as far as it does."""

    def __init__(
        self, config: Config, checkpointer: Checkpointer, stepper: Stepper, device: torch.device
    ) -> None:
        """Prepares.

        Args:
            config: validated.
            checkpointer: saves.
            stepper: knows whether the state is finite.
            device: where the step's collective is.
        """
        self.config = config
        self.checkpointer = checkpointer
        self.stepper = stepper
        self.device = device

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns whether this rank still writes a checkpoint."""
        return {"writing": self.checkpointer.read(self.device)}

    def record(self, report: StepReport) -> Record:
        """Returns how long training stood still for saves, if it did since the last step."""
        blocked = self.checkpointer.take_blocked_seconds()
        return {"checkpoint_seconds": blocked} if blocked else {}

    def after_step(self, report: StepReport) -> None:
        """Makes a save that every rank has written a checkpoint, and starts the one that is due.

        Raises:
            FloatingPointError: the state is not finite; nothing is saved.
            CheckpointWriteError: a checkpoint could not be written.
        """
        self.checkpointer.advance(report.sums["writing"])
        interval = self.config.checkpoint.interval
        due = report.stops or is_due(report.step, interval, self.config.train.steps)
        if not (interval and due):
            return
        if not self.stepper.state_is_finite():
            raise FloatingPointError(
                f"step {report.step}: weights or moments are not finite; not saving them"
            )
        self.checkpointer.save(Position(report.step, report.tokens, report.skipped))
