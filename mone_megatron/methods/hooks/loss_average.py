"""Averages the loss over steps, so that its course is easier to see than that of single steps.

After n applied steps it is the mean of their losses with weights 0.98, 0.98 ** 2, ... from the last
one backwards, divided by the sum of the weights, so that the first steps count as they should.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mone_megatron.methods.hook import Hook, HookMethod, Record, StepReport

_DECAY = 0.98


class LossAverage(Hook):
    """Records ``loss_average``; checkpoints hold it, so a resumed run goes on with it."""

    def __init__(self) -> None:
        """Starts with no step."""
        self.total = 0.0
        self.weight = 0.0

    def record(self, report: StepReport) -> Record:
        """Returns the average up to this step; a step that was not applied does not count."""
        if report.fault is None:
            self.total = _DECAY * self.total + report.loss
            self.weight = _DECAY * self.weight + 1.0
        return {"loss_average": self.total / self.weight} if self.weight else {}

    def state(self) -> dict[str, Any]:
        """Returns both sums."""
        return {"total": self.total, "weight": self.weight}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with both sums."""
        self.total, self.weight = state["total"], state["weight"]


METHOD = HookMethod(
    name="loss_average",
    formula="mean of the losses so far, weighted 0.98 to the power of their age",
    source="common; with the correction of the first steps as in arXiv 1412.6980",
    make=lambda session: LossAverage(),
)
