"""Optional dependencies: what a user is told when they are not installed."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are there, without importing them.

    Raises:
        ValueError: naming those that are not, and the fix.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: needed and not installed; pip install -e '.[{extra}]'"
        )
