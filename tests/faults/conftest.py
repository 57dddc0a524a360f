"""The fault-injection suite: each test belongs to a row of the table in docs/reliability.md.

A test counts what it tried and what held in a :class:`Tally`; short counts by default, the full
ones with ``--faults-full``. ``make faults`` runs the full ones and writes the table:

    pytest tests/faults --faults-full --faults-table docs/reliability.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from faults_table import Tally, merge, render, write_into

_rows: dict[int, list[Tally]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults-full", action="store_true", help="the full counts of every row")
    group.addoption("--faults-table", metavar="FILE", help="write the table into this document")
    group.addoption("--faults-update", action="store_true", help="keep the table's other lines")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to try the full counts."""
    return bool(request.config.getoption("--faults-full", default=False))


@pytest.fixture
def tally(
    record_property: Callable[[str, object], None],
) -> Callable[[int, str], AbstractContextManager[Tally]]:
    """``with tally(row, what) as t:`` counts one part of a row, and fails unless all held."""

    @contextmanager
    def count(row: int, what: str) -> Iterator[Tally]:
        one = Tally(row, what)
        try:
            yield one
        finally:
            record_property("fault", asdict(one))
        assert one.tried, "nothing was tried"
        assert one.held == one.tried, "\n".join(one.fell_short)

    return count


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On the process that reports, also when others ran the tests."""
    if report.when != "call":
        return
    for name, value in report.user_properties:
        if name == "fault":
            one = Tally(**value)  # type: ignore[arg-type]
            _rows.setdefault(one.row, []).append(one)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    target = config.getoption("--faults-table", default=None)
    if not config.getoption("--faults-full", default=False) and not target:
        return
    lines = render(merge(_rows))
    terminalreporter.section("faults: what was tried and what held")
    for line in lines:
        terminalreporter.write_line(line)
    if target:
        write_into(Path(target), lines, update=config.getoption("--faults-update"))
