"""The page of a run that is going: written meanwhile by a process of its own, and at the end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from run_folders import RunBuilder

from mone_megatron.helpers import HelperError
from mone_megatron.report.run_page import report_page, write_report
from mone_megatron.report.runs import load_run
from mone_megatron.train.hooks.report import ReportHook

LIVE = 'id="live"'


def _until_written(hook: ReportHook) -> None:
    """Steps until the page of the first step is there, as training does."""
    deadline = time.monotonic() + 300
    hook.on_step({"step": 1.0})
    assert hook._writer is not None
    while hook._writer is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        # Another one is not begun before a hundred times as long.
        hook.on_step({"step": 2.0})


def test_a_run_has_its_page_while_it_runs(make_run: RunBuilder) -> None:
    folder = make_run("run", steps=12, status="running")
    hook = ReportHook(folder, 0.01)
    hook.on_start()
    time.sleep(0.02)
    _until_written(hook)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert LIVE in page
    assert "The run is going, at step 12 of 12." in page
    assert "killed without a word" not in page
    assert hook._wait > 0.05
    # What is being written when the run ends is left, and comes after nothing.
    hook._began -= 10 * hook._wait
    hook.on_step({"step": 3.0})
    assert hook._writer is not None
    hook.on_end("completed")
    assert LIVE not in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "loss.png").is_file()
    assert not list(folder.glob(".report.html*"))


def test_what_keeps_the_page_from_being_written_is_told(make_run: RunBuilder) -> None:
    folder = make_run("run", status="running")
    (folder / "config.yaml").unlink()
    hook = ReportHook(folder, 0.01)
    hook.on_start()
    time.sleep(0.02)
    with pytest.raises(HelperError, match=r"ended with code 1: ValueError: .*config.yaml"):
        _until_written(hook)


def test_none_is_written_meanwhile_where_none_is_wanted(make_run: RunBuilder) -> None:
    folder = make_run("run", status="running")
    hook = ReportHook(folder, 0)
    hook.on_start()
    for step in range(3):
        hook.on_step({"step": float(step)})
    assert hook._writer is None


def test_a_line_that_is_being_written_is_no_killed_process(make_run: RunBuilder) -> None:
    folder = make_run("run", steps=5, status="running")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = load_run(folder)
    assert run.broken_lines == 1
    assert "half-written" in report_page(run)
    live = report_page(run, reload_seconds=30)
    assert "half-written" not in live
    # A page that stays has nothing that reads it again, and neither has an image to wait for.
    assert LIVE not in report_page(run)
    assert "<noscript>" not in live


def test_the_path_is_returned(make_run: RunBuilder) -> None:
    folder: Path = make_run("run")
    assert write_report(folder, reload_seconds=5) == folder / "report.html"
