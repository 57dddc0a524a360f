"""The loss on the validation split: ``train.eval_interval`` and ``train.eval_at_start``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mone_megatron.config.schema import TrainConfig
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.train.hooks.due import is_due
from mone_megatron.train.step import Batch, Stepper


class ValidationHook(Hook):
    """Evaluates every so many steps, always on the same batches. Collective over all ranks."""

    def __init__(
        self, train: TrainConfig, stepper: Stepper, batches: Callable[[], Iterator[Batch]]
    ) -> None:
        """Prepares.

        Args:
            train: how often and how much to evaluate.
            stepper: evaluates.
            batches: gives this rank's validation microbatches, from their beginning.
        """
        self.train = train
        self.stepper = stepper
        self.batches = batches

    def record_start(self) -> Record:
        """Returns ``val_loss`` of the model as the run finds it."""
        return self._evaluate()

    def record(self, report: StepReport) -> Record:
        """Returns ``val_loss`` on the steps that evaluate."""
        if not is_due(report.step, self.train.eval_interval, self.train.steps):
            return {}
        return self._evaluate()

    def _evaluate(self) -> Record:
        return {"val_loss": self.stepper.evaluate(self.batches(), self.train.eval_steps)}
