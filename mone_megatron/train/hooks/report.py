"""``report.html`` and ``loss.png``, drawn when a run ends."""

from __future__ import annotations

import sys
from pathlib import Path

from mone_megatron.methods.hook import Hook, Record


class ReportHook(Hook):
    """Draws ``loss.png`` and ``report.html`` at the end, also of an interrupted run."""

    def __init__(self, folder: Path) -> None:
        """Reports on ``folder``."""
        self.folder = folder
        self.steps = 0

    def on_step(self, record: Record) -> None:
        """Takes note that there is something to draw."""
        self.steps += 1

    def on_end(self, status: str) -> None:
        """Draws."""
        if self.steps:
            # They import matplotlib, which takes a second that nobody has to wait for before.
            from mone_megatron.report.plots import write_loss_plot
            from mone_megatron.report.run_page import write_report

            write_loss_plot(self.folder)
            page = write_report(self.folder)
            print(f"report: {page}", file=sys.stderr, flush=True)
