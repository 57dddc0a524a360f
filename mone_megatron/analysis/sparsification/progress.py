"""Progress of a long measurement: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from mone_megatron.analysis.formatting import format_count, format_duration

_SECONDS_BETWEEN_LINES = 20.0


class WorkProgress:
    """Counts work towards a total and shows how far it is and the time left."""

    def __init__(
        self, title: str, total: int, *, unit: str = "tokens", stream: TextIO | None = None
    ) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._stream = stream if stream is not None else sys.stderr
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> WorkProgress:
        if self._stream.isatty():
            self._bar = tqdm(
                total=self._total,
                desc=self._title,
                unit=f" {self._unit}",
                unit_scale=True,
                dynamic_ncols=True,
                file=self._stream,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            self._line()

    def add(self, count: int) -> None:
        """Count ``count`` more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        passed = self._printed - self._started
        left = passed / self._done * (self._total - self._done) if self._done else None
        print(
            f"{self._title}: {100 * self._done / max(self._total, 1):.0f}% of "
            f"{format_count(self._total)} {self._unit}, {format_duration(passed)} passed, "
            f"{format_duration(left)} left",
            file=self._stream,
            flush=True,
        )
