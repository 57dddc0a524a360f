"""Progress: lines with the time left in a log, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from mone_megatron import progress
from mone_megatron.lab.sparsification.progress import WorkProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with WorkProgress("model: 2 prunings", 4000, stream=stream) as shown:
        for _ in range(4):
            now += 15
            shown.add(1000)
    assert stream.getvalue().splitlines() == [
        "model: 2 prunings: 50% of 4.00K tokens, 30 s passed, 30 s left",
        "model: 2 prunings: 100% of 4.00K tokens, 60 s passed, 0.0 s left",
        "model: 2 prunings: 100% of 4.00K tokens, 60 s passed, 0.0 s left",
    ]


def test_a_failure_has_no_last_line() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), WorkProgress("model", 10, stream=stream):
        raise KeyError
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar() -> None:
    stream = Terminal()
    with WorkProgress("model", 10, unit="layers", stream=stream) as shown:
        shown.add(10)
    assert "model: 100%" in stream.getvalue()
    assert "10.0/10.0" in stream.getvalue()
    assert "layers/s" in stream.getvalue()
