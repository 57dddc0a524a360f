"""Says what a fault is: something that must hold of every drawing, and does not."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Is one thing that does not hold.

    Attributes:
        check: the name of what was checked, such as ``resume``.
        what: what does not hold, one line.
    """

    check: str
    what: str

    @property
    def kind(self) -> str:
        """Returns what it has in common with the same fault of another drawing."""
        words = re.sub(r"[-\w./=\[\],]*[\d/=][-\w./=\[\],]*", "#", self.what)
        return f"{self.check}: {words[:160]}"
