"""Writes ``report.html`` of a run that is going: ``-m mone_megatron.report.live RUN SECONDS``.

It is a process of its own, so that training does not wait for it. SECONDS is how long the page
waits before it reads itself again.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> int:
    """Writes the page and returns 0."""
    # Ended in the middle, it takes the unfinished file with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # Training comes first.
    os.nice(10)
    from mone_megatron.report.run_page import write_report

    folder, seconds = sys.argv[1:]
    write_report(Path(folder), reload_seconds=float(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
