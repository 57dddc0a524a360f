"""Tells whether two versions measured the same, value by value, bit by bit: as table and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mone_megatron.testing.commit_comparison.values import Scalar, Values

Status = Literal["equal", "different", "not compared"]
_ABSENT = "absent"


@dataclass(frozen=True)
class Measured:
    """Holds what one version computed of one thing.

    Attributes:
        values: by name, in the order in which they are compared; empty when it failed.
        error: why it failed; "" when it did not.
    """

    values: Values
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """Holds the comparison of one thing.

    Attributes:
        what: the thing.
        status: ``not compared`` when either version failed, which is no proof of anything.
        values: how many were compared.
        differing: names of the values that BASE has and HEAD has not, or has otherwise.
        added: names that HEAD alone has; no difference.
        detail: for people: the first difference with both values, or the error.
    """

    what: str
    status: Status
    values: int
    differing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the outcome as plain values."""
        return {
            "what": self.what,
            "status": self.status,
            "values": self.values,
            "differing": list(self.differing),
            "added": list(self.added),
            "detail": self.detail,
        }


def compare(base: Mapping[str, Measured], head: Mapping[str, Measured]) -> list[Outcome]:
    """Compares everything that was measured of two versions.

    Args:
        base: what BASE computed, by thing.
        head: what HEAD computed; the same things.
    """
    assert base.keys() == head.keys()
    return [compare_one(what, base[what], head[what]) for what in base]


def compare_one(what: str, base: Measured, head: Measured) -> Outcome:
    """Compares one thing.

    Floats are equal when their bits are: 0.0 is not -0.0, and 1 is not 1.0, but NaN is NaN.
    """
    errors = [f"{name}: {side.error}" for name, side in (("BASE", base), ("HEAD", head))]
    failed = [error for error, side in zip(errors, (base, head), strict=True) if side.error]
    if failed:
        return Outcome(what, "not compared", 0, detail="; ".join(failed))
    assert base.values, f"{what}: nothing was measured"
    differing = tuple(
        name
        for name, value in base.values.items()
        if name not in head.values or exact(value) != exact(head.values[name])
    )
    added = tuple(name for name in head.values if name not in base.values)
    if not differing:
        detail = f"HEAD adds {len(added)}: {_few(added)}" if added else ""
        return Outcome(what, "equal", len(base.values), added=added, detail=detail)
    first = differing[0]
    theirs = _shown(head.values[first]) if first in head.values else _ABSENT
    detail = f"{first}: BASE {_shown(base.values[first])}, HEAD {theirs}"
    if len(differing) > 1:
        detail += f" (and {len(differing) - 1} more)"
    return Outcome(what, "different", len(base.values), differing, added, detail)


def exact(value: Scalar) -> str:
    """Returns a text that two values share when they are the same to the last bit."""
    if isinstance(value, float):
        return "float nan" if math.isnan(value) else f"float {value.hex()}"
    return f"{type(value).__name__} {value}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns the outcomes for a terminal: what, how many values, equal or the first difference."""
    width = max(len(outcome.what) for outcome in outcomes)
    lines = [f"{'what':{width}}  {'values':>7}  result", f"{'-' * width}  {'-' * 7}  {'-' * 12}"]
    for outcome in outcomes:
        result = outcome.status if outcome.status == "equal" else outcome.status.upper()
        result += f": {outcome.detail}" if outcome.detail else ""
        lines.append(f"{outcome.what:{width}}  {outcome.values:>7,}  {result}")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns one line on all outcomes."""
    values = sum(outcome.values for outcome in outcomes)
    equal = sum(outcome.status == "equal" for outcome in outcomes)
    if equal == len(outcomes):
        return f"EQUAL: all {values:,} values of {equal} comparisons, to the last bit"
    return f"NOT EQUAL: {len(outcomes) - equal} of {len(outcomes)} comparisons (see above)"


def _shown(value: Scalar) -> str:
    return f"{value.hex()} ({value!r})" if isinstance(value, float) else repr(value)


def _few(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
