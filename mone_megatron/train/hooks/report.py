"""``report.html`` and ``loss.png``, drawn when a run ends; the page meanwhile, too."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from mone_megatron.helpers import HelperError, ending, starting
from mone_megatron.methods.hook import Hook, Record

# A page is written again after so many times as long as the last one took.
_SHARE = 100
# How long a page that is being written when the run ends may take to give up.
_PATIENCE_SECONDS = 10.0


class ReportHook(Hook):
    """Draws ``loss.png`` and ``report.html`` at the end, also of an interrupted run.

    While the run is going a process of its own writes the page every now and then; it is what a
    browser then reads again by itself.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        """Reports on a run.

        Args:
            folder: run.dir.
            seconds: least time between two pages of a run that is going; 0 for none of these.
        """
        self.folder = folder
        self.seconds = seconds
        self.steps = 0
        self._writer: subprocess.Popen[str] | None = None
        self._began = 0.0
        # How long to wait after the last one began.
        self._wait = seconds

    def on_start(self) -> None:
        """Takes note of when the run began."""
        self._began = time.monotonic()

    def on_step(self, record: Record) -> None:
        """Has the page written, when it is time.

        Raises:
            HelperError: the process that writes it cannot be started, or failed.
        """
        self.steps += 1
        if not self.seconds:
            return
        if self._writer is not None:
            self._look(self._writer)
        elif time.monotonic() - self._began >= self._wait:
            self._began = time.monotonic()
            command = ["-m", "mone_megatron.report.live", str(self.folder), f"{self._wait:g}"]
            with starting(
                "the process that writes report.html of the running run",
                "logging.report_seconds=0 writes it at the end alone",
            ):
                self._writer = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    # Ctrl-C is for the run; it ends the writer.
                    start_new_session=True,
                )

    def _look(self, writer: subprocess.Popen[str]) -> None:
        code = writer.poll()
        if code is None:
            return
        self._writer = None
        self._wait = max(self.seconds, _SHARE * (time.monotonic() - self._began))
        _, said = writer.communicate()
        if code:
            last = (said.strip().splitlines() or [""])[-1]
            raise HelperError(f"the process that writes it {ending(code)}: {last}".rstrip(": "))

    def on_end(self, status: str) -> None:
        """Draws."""
        if self._writer is not None:
            # Its page would come after the last one.
            self._writer.terminate()
            try:
                self._writer.communicate(timeout=_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._writer.kill()
                self._writer.communicate()
            self._writer = None
        if self.steps:
            # They import matplotlib, which takes a second that nobody has to wait for before.
            from mone_megatron.report.plots import write_loss_plot
            from mone_megatron.report.run_page import write_report

            write_loss_plot(self.folder)
            page = write_report(self.folder)
            print(f"report: {page}", file=sys.stderr, flush=True)
