"""Exports, and what transformers answers for them: made once for all tests of engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter
from reference_answers import Answer, answers_of, prompts_of
from served_models import make_exports

# Tokens that are generated.
NEW = 32


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by the names of ``served_models.RUNS``."""
    return make_exports(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def prompts(exports: dict[str, Path]) -> list[list[int]]:
    """Eight, of as many lengths; the models share a tokenizer."""
    return prompts_of(exports["plain"])


@pytest.fixture(scope="session")
def expected(exports: dict[str, Path], prompts: list[list[int]]) -> dict[str, list[Answer]]:
    """The answers in fp32."""
    return {name: answers_of(folder, prompts, NEW) for name, folder in exports.items()}


_MEASURED: list[str] = []


@pytest.fixture(scope="session")
def measured() -> list[str]:
    """Lines to show when all tests have run: docs/serving.md has them."""
    return _MEASURED


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Shows what was measured."""
    for line in _MEASURED:
        terminalreporter.write_line(line)
