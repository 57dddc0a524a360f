"""Progress of a long job: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Counts bytes towards a total and shows them; a context manager."""

    def __init__(self, title: str, total_bytes: int, stream: TextIO | None = None) -> None:
        self._title = title
        self._total = total_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_bytes, desc=title, unit="B", unit_scale=True, file=self._stream
            )

    def __enter__(self) -> ByteProgress:
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
        """Counts ``count`` more bytes."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        rate = self._done / max(self._printed - self._started, 1e-9)
        print(
            f"{self._title}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB,"
            f" {rate / 1e6:.1f} MB/s",
            file=self._stream,
            flush=True,
        )
