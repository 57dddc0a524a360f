"""Finds where two runs that round differently first choose other experts or neurons.

Layouts, and versions of the code, add the same numbers in different orders. Up to such a step their
losses agree to rounding, and from there on within wider bounds only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_COUNTED = ("router/tokens_per_expert", "mone/load_entropy", "mone/load_max_over_mean")


def first_flip(
    reference: Sequence[Mapping[str, float]], records: Sequence[Mapping[str, float]]
) -> int:
    """Returns the first step whose use of experts or neurons differs; one past the last if none.

    Args:
        reference: the records of one run, as ``metrics.jsonl`` has them.
        records: those of the other run, of the same steps.

    Raises:
        KeyError: a number that tells it is not recorded in both.
    """
    for expected, actual in zip(reference, records, strict=True):
        for key, value in expected.items():
            # Two flips may cancel in the counts of a step, and show in its microbatches: one token
            # moves their balance by 1e-5, rounding by 1e-7.
            if key.startswith(_COUNTED):
                least = 1e-9
            elif key.endswith("load_balancing_loss"):
                least = 5e-6 * value
            else:
                continue  # not every layout has it, or it follows from these
            if abs(actual[key] - value) > least:
                return int(expected["step"])
    return len(reference) + 1
