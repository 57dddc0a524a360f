"""The keep ratio of each step: ``mone.keep_ratio_schedule``.

It is a function of the step and the configuration, so a resumed run, a rolled back one and every
layout agree on it without any state.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mone_megatron.config.schema import MoNEConfig
from mone_megatron.mone.selection import NeuronSelector


class KeepRatio:
    """Tells the selections of this rank what to keep."""

    def __init__(self, mone: MoNEConfig, chunks: Iterable[nn.Module]) -> None:
        """Find the selections."""
        self.mone = mone
        self.scheduled = mone.enabled and mone.keep_ratio_schedule != "constant"
        self.selections = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, NeuronSelector)
        ]

    def set_for(self, step: int) -> float | None:
        """Set the ratio of a step; the ratio, or None where it never changes."""
        if not self.scheduled:
            return None
        ratio = self.mone.keep_ratio_at(step)
        for selection in self.selections:
            selection.set_keep_ratio(ratio)
        return ratio
