"""Shows the progress of a long measurement, with the time left."""

from __future__ import annotations

from typing import TextIO

from mone_megatron.progress import Progress
from mone_megatron.report.formatting import format_count, format_duration


class WorkProgress(Progress):
    """Counts work towards a total and shows how far it is and the time left."""

    seconds_between_lines = 20.0

    def __init__(
        self, title: str, total: int, *, unit: str = "tokens", stream: TextIO | None = None
    ) -> None:
        super().__init__(title, total, {"unit": f" {unit}", "dynamic_ncols": True}, stream)
        self._unit = unit

    def line(self, passed: float) -> str:
        """Returns the line that shows the share that is done, the time passed and left."""
        left = passed / self._done * (self._total - self._done) if self._done else None
        return (
            f"{100 * self._done / max(self._total, 1):.0f}% of "
            f"{format_count(self._total)} {self._unit}, {format_duration(passed)} passed, "
            f"{format_duration(left)} left"
        )
