"""Words the numbers that messages show and offer."""

from __future__ import annotations

from collections.abc import Sequence


def is_multiple(value: int, of: int) -> bool:
    """Returns whether ``of`` divides ``value``; True for sizes that are wrong by themselves."""
    # A size below 1 has its own line already.
    return of < 1 or value < 0 or value % of == 0


def near_multiples(value: int, of: int) -> str:
    """Returns the multiples of ``of`` around ``value``: "6 or 9" for 7 and 3."""
    below = value // of * of
    return f"{below} or {below + of}" if below > 0 else str(of)


def near_divisors(value: int, near: int) -> str:
    """Returns the divisors of ``value`` around ``near``: "2 or 4" for 8 and 3."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(str(d) for d in below + above) or str(value)


def listed(values: Sequence[float]) -> str:
    """Returns numbers as a list of the configuration: "[0.5, 1]"."""
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
