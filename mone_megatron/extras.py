"""Holds what the command lines over optional libraries share."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """Checks that the packages of an extra are there, without importing them.

    Raises:
        ValueError: naming those that are not, and the fix.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: needed and not installed; pip install -e '.[{extra}]'"
        )


def calm_bars() -> None:
    """Lets libraries' progress bars (tqdm) write only now and then where there is no terminal.

    To be called before they are imported; a setting of the user's stays.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")
