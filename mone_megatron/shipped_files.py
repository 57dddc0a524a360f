"""Tells where the files are that come with the package and are no modules: ``conf/``.

They stand at the top of a checkout, where people look for them; a wheel carries a copy inside the
package (setup.py). Imports nothing that takes time.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# As setup.py names the copies.
_COPIES = _PACKAGE / "shipped"


def shipped(name: str) -> Path:
    """Returns the path of a shipped file or folder, such as ``conf``; it may not exist."""
    copy = _COPIES / name
    return copy if copy.exists() else _PACKAGE.parent / name
