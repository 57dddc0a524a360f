"""Tells whether an estimated number is determined by what was measured: one wording for all.

A number that a fit or a search returns may rest on the data, or on where the fit began, on the
edge of what was allowed, or on too few samples. Such a number is printed with its reasons, never
like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

NOT_IDENTIFIED = "not identified"

# An interval whose ends differ by this factor or more knows no order of magnitude.
WIDE_FACTOR = 10.0

# Why a number is not determined:
# bound: the estimate lies at the edge of what was allowed or tried;
# flat: other numbers can make up for it without a change in what was measured;
# wide: the interval spans an order of magnitude or all meaningful values;
# zero: the interval of something that must differ from 0 holds 0;
# few: too few samples to tell;
# missing: too many resamples or samples have no such number;
# rests: it is computed from numbers that are not identified.
DoubtKind = Literal["bound", "flat", "wide", "zero", "few", "missing", "rests"]


@dataclass(frozen=True)
class Doubt:
    """Holds one reason why a number is not identified, of a kind and in words."""

    kind: DoubtKind
    reason: str


def wide_interval(low: float, high: float) -> list[Doubt]:
    """Returns a doubt when an interval of a positive number spans an order of magnitude."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [Doubt("wide", "its interval is unbounded")]
    if high <= 0 or high < WIDE_FACTOR * low:
        return []
    if low <= 0 or high / low > 1e6:
        return [Doubt("wide", "its interval spans more than a factor of 1,000,000")]
    return [Doubt("wide", f"its interval spans a factor of {high / low:,.0f}")]


def holds_zero(low: float, high: float) -> list[Doubt]:
    """Returns a doubt when the interval of a number that must differ from 0 holds 0."""
    if low <= 0 <= high:
        return [Doubt("zero", f"its interval holds 0 ({low:.3g} to {high:.3g})")]
    return []


def missing_samples(found: int, total: int, confidence: float) -> list[Doubt]:
    """Returns a doubt when more samples lack the number than the interval leaves out.

    Args:
        found: samples that have it.
        total: all of them.
        confidence: of the interval, such as 0.95.
    """
    if not total or found >= confidence * total:
        return []
    return [
        Doubt("missing", f"{total - found} of {total} resamples have no such number, more than the "
              f"{1 - confidence:.0%} that its interval may leave out")
    ]  # fmt: skip


def few_samples(count: int, enough: int, one: str, many: str) -> list[Doubt]:
    """Returns a doubt when there are fewer samples than needed to tell anything of their scatter.

    Args:
        count: how many there are.
        enough: how many are needed.
        one, many: what one and several of them are called, such as ``seed`` and ``seeds``.
    """
    if count >= enough:
        return []
    name = one if count == 1 else many
    return [Doubt("few", f"{count} {name}, at least {enough} are needed to know its error")]


def rests_on(doubted: Iterable[str]) -> list[Doubt]:
    """Returns a doubt when a number is computed from others that are not identified."""
    names = list(doubted)
    verb = "is" if len(names) == 1 else "are"
    if not names:
        return []
    return [Doubt("rests", f"it rests on {', '.join(names)}, which {verb} {NOT_IDENTIFIED}")]


def reasons(doubts: Sequence[Doubt]) -> str:
    """Returns the reasons in one line, separated by semicolons; "" when there are none."""
    return "; ".join(doubt.reason for doubt in doubts)


def mark(doubts: Sequence[Doubt]) -> str:
    """Returns ``not identified`` for a table, or "" for a number that is."""
    return NOT_IDENTIFIED if doubts else ""
