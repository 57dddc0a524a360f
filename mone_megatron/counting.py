"""Says how many there are of something, in the singular and the plural."""

from __future__ import annotations

_ENDINGS = ("s", "x", "z", "ch", "sh")


def counted(number: int, noun: str) -> str:
    """Returns ``1 process``, ``2 processes`` or ``1,024 tokens``.

    Args:
        number: how many.
        noun: the singular, with a regular plural; words before it stay as they are.
    """
    plural = f"{noun}es" if noun.endswith(_ENDINGS) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
