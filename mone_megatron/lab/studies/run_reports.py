"""Writes ``report.html`` of runs that have none, since the runs of a study write only numbers."""

from __future__ import annotations

from collections.abc import Sequence

from mone_megatron.lab.studies.runner import Place
from mone_megatron.report.run_page import REPORT_FILE, write_report


def write_missing(runs: Sequence[Place]) -> int:
    """Writes the report of every run that is trained to its end and has none; returns how many."""
    lacking = [run for run in runs if run.done and not (run.folder / REPORT_FILE).is_file()]
    for run in lacking:
        write_report(run.folder)
    return len(lacking)
