"""The keep ratio of each step: ``mone.keep_ratio_schedule``.

It is a function of the step and the configuration, so a resumed run, a rolled back one and every
layout agree on it without any state.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mone_megatron.config.schema import MoNEConfig
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.mone.selection import NeuronSelector


class KeepRatioHook(Hook):
    """Tells the selections of this rank how many neurons to keep, where that changes."""

    def __init__(self, mone: MoNEConfig, chunks: Iterable[nn.Module]) -> None:
        """Finds the selections."""
        self.mone = mone
        self.scheduled = mone.enabled and mone.keep_ratio_schedule != "constant"
        self.selections = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, NeuronSelector)
        ]

    def on_start(self) -> None:
        """Sets the ratio of the beginning, for what looks at the model before the first step."""
        self.before_step(0)

    def record_start(self) -> Record:
        """Returns the ratio of the beginning, where there is a schedule."""
        return self._ratio(0)

    def before_step(self, step: int) -> None:
        """Sets the ratio of a step."""
        if self.scheduled:
            for selection in self.selections:
                selection.set_keep_ratio(self.mone.keep_ratio_at(step))

    def record(self, report: StepReport) -> Record:
        """Returns the ratio, where there is a schedule."""
        return self._ratio(report.step)

    def _ratio(self, step: int) -> Record:
        return {"mone/keep_ratio": self.mone.keep_ratio_at(step)} if self.scheduled else {}
