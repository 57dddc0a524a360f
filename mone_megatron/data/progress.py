"""Shows progress over bytes that are read."""

from __future__ import annotations

from typing import TextIO

from mone_megatron.progress import Progress


class ByteProgress(Progress):
    """Counts bytes and shows how fast they come."""

    seconds_between_lines = 10.0

    def __init__(self, title: str, total_bytes: int, stream: TextIO | None = None) -> None:
        super().__init__(title, total_bytes, {"unit": "B"}, stream)

    def line(self, passed: float) -> str:
        """Returns the megabytes read, and how many a second."""
        rate = self._done / max(passed, 1e-9)
        return f"{self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
