"""Says in words what the differences of a study tell, and what it would take to tell more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scipy.stats import t as student

from mone_megatron.counting import counted
from mone_megatron.lab.studies.outcome import Outcome, Variant
from mone_megatron.report.stats import Interval

# The smallest difference of losses that is of interest, in nats a token.
OF_INTEREST = 0.01
# The probability with which a difference that is there shall be seen.
POWER = 0.8
_CONFIDENCE = 0.95
# More seeds than these are told as "more than".
_MANY_SEEDS = 1000


def deviation(interval: Interval) -> float:
    """Returns the standard deviation of the samples of an interval; NaN for a single one."""
    if interval.count < 2:
        return math.nan
    quantile = float(student.ppf(0.5 + _CONFIDENCE / 2, interval.count - 1))
    return interval.half_width * math.sqrt(interval.count) / quantile


def seeds_to_see(difference: float, spread: float) -> int | None:
    """Returns the fewest seeds whose 95% interval leaves 0 out with a probability of 80%.

    Args:
        difference: that is there, such as 0.01.
        spread: the standard deviation of paired differences over seeds.

    Returns:
        At least 2; None where the spread is not known or more than 1,000 are needed.
    """
    if not math.isfinite(spread):
        return None
    for count in range(2, _MANY_SEEDS + 1):
        if smallest_seen(spread, count) <= difference:
            return count
    return None


def smallest_seen(spread: float, count: int) -> float:
    """Returns the difference that ``count`` seeds see with a probability of 80%.

    It is (t(0.975) + t(0.8)) s / sqrt(n), with Student's quantiles of n - 1 degrees of freedom.
    """
    if count < 2:
        return math.nan
    quantiles = student.ppf(0.5 + _CONFIDENCE / 2, count - 1) + student.ppf(POWER, count - 1)
    return float(quantiles) * spread / math.sqrt(count)


def distinct_after_holm(variants: Sequence[Variant]) -> list[Variant]:
    """Returns the variants whose difference is not 0 when all of them are asked about at once.

    Holm's procedure: in order of their p-values they are held against 0.05 / m, 0.05 / (m - 1),
    ..., and the first that fails ends it.
    """
    found: list[tuple[float, Variant]] = []
    for variant in variants:
        interval = variant.compared
        if interval is None or not math.isfinite(interval.mean) or interval.count < 2:
            continue
        error = deviation(interval) / math.sqrt(interval.count)
        ratio = abs(interval.mean) / error if error else math.inf
        found.append((2 * float(student.sf(ratio, interval.count - 1)), variant))
    found.sort(key=lambda one: one[0])
    distinct = []
    for place, (probability, variant) in enumerate(found):
        if probability > (1 - _CONFIDENCE) / (len(found) - place):
            break
        distinct.append(variant)
    return distinct


def conclusions(outcome: Outcome) -> list[str]:
    """Returns what the study tells, a sentence or two each: what differs, what does not and how
    many seeds would tell, what was not compared, and what is missing.
    """
    compared = [one for one in outcome.variants if one.compared is not None]
    said = []
    for verdict in ("lower", "higher"):
        if names := _names(one for one in compared if one.verdict == verdict):
            said.append(f"Loss {verdict} than that of {outcome.reference}: {names}.")
    if len(compared) > 1 and any(one.verdict in ("lower", "higher") for one in compared):
        names = _names(distinct_after_holm(compared)) or "none"
        said.append(
            f"{len(compared)} differences are asked about at once, of which one in twenty would "
            f"look like one by chance; at 95% for all together (Holm) there remain: {names}."
        )
    if within := [one for one in compared if one.verdict == "no difference seen"]:
        said.append(_noise(outcome, within))
    if off := [one for one in outcome.variants if one.is_off_budget]:
        said.append(
            "Not compared, since what a token uses is not what the study asks for: "
            + ", ".join(f"{one.name} ({one.off_budget:+.1%})" for one in off)
            + "."
        )
    if outcome.missing:
        said.append(f"Not trained yet: {missing_runs(outcome)}.")
    return said


def missing_runs(outcome: Outcome) -> str:
    """Returns the runs that are missing, such as ``mass (seeds 4, 5), pooled (all seeds)``."""
    there = {one.name for one in outcome.variants}
    seeds: dict[str, list[int]] = {}
    for name, seed in outcome.missing:
        seeds.setdefault(name, []).append(seed)
    return ", ".join(
        f"{name} ({'seed' if len(lacking) == 1 else 'seeds'} {', '.join(map(str, lacking))})"
        if name in there
        else f"{name} (all seeds)"
        for name, lacking in seeds.items()
    )


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(one.name for one in variants)


def _noise(outcome: Outcome, within: Sequence[Variant]) -> str:
    """Returns the sentence on variants whose interval holds 0."""
    spreads = sorted(deviation(one.difference) for one in within if one.difference is not None)
    counts = sorted({len(one.differences) or len(one.seeds) for one in within})
    typical = spreads[len(spreads) // 2]
    seen = smallest_seen(typical, counts[-1])
    needed = [seeds_to_see(OF_INTEREST, spread) for spread in (spreads[0], spreads[-1])]
    few, many = (f"more than {_MANY_SEEDS:,}" if n is None else f"{n:,}" for n in needed)
    seeds = few if few == many else f"{few} to {many}"
    return (
        f"Within the noise of {outcome.reference}: {_names(within)}. Their differences scatter "
        f"from seed to seed with a standard deviation of {_span(spreads)} nats: "
        f"{counted(counts[-1], 'seed')} would show a difference of about {seen:.3f} nats in 4 of 5 "
        f"such studies, and one of {OF_INTEREST:g} nats takes {seeds} seeds."
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"
