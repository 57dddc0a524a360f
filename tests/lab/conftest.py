"""The fixture that makes run folders, and a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium_browser import Browser, install, open_browser
from run_folders import make_run

__all__ = ["make_run"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    if reason := install():
        pytest.skip(reason)
    with open_browser() as opened:
        yield opened
