"""Shows the progress of a long job: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, TextIO, TypeVar

from tqdm import tqdm

P = TypeVar("P", bound="Progress")


class Progress(ABC):
    """Counts work towards a total and shows how far it is; a context manager."""

    seconds_between_lines: ClassVar[float]

    def __init__(
        self, title: str, total: int, bar: dict[str, Any], stream: TextIO | None = None
    ) -> None:
        """Begins to show the progress, with a bar on a terminal.

        Args:
            title: the title of the job.
            total: how much work there is, as :meth:`add` counts it.
            bar: tqdm's settings of the bar, such as its unit.
            stream: where it is shown; standard error by default.
        """
        self._title, self._total = title, total
        self._stream = stream if stream is not None else sys.stderr
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, desc=title, unit_scale=True, file=self._stream, **bar)

    @abstractmethod
    def line(self, passed: float) -> str:
        """Returns how far it is after ``passed`` seconds, without the title."""

    def __enter__(self: P) -> P:
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
            self._print_line()

    def add(self, count: int) -> None:
        """Counts ``count`` more and shows that."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= self.seconds_between_lines:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        line = self.line(self._printed - self._started)
        print(f"{self._title}: {line}", file=self._stream, flush=True)
