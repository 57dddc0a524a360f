"""Says when two runs that add numbers up in another order, or on another machine, are the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mone_megatron.testing.flips import first_flip

# Of losses and gradient norms; from a flip on, of each.
TOLERANCE = 1e-5
LOSS_AFTER_FLIP = 1e-4
GRAD_NORM_AFTER_FLIP = 2e-2
# Of losses of the same layout in another version, on another machine.
RECORDED_TOLERANCE = 1e-6


def names_in_all_layouts(record: dict[str, float]) -> set[str]:
    """What a run records in whatever layout: what chunks of tokens keep is known only where a rank
    has all neurons of a layer.
    """
    return {name for name in record if "/chunk_union_" not in name}


def assert_close_until_a_flip(
    reference: Sequence[dict[str, float]],
    records: Sequence[dict[str, float]],
    *,
    loss: float = TOLERANCE,
) -> int:
    """Asserts that losses and gradient norms are close, and from a flip on within wider bounds.

    Returns the step of the flip.
    """
    assert [record["step"] for record in records] == [record["step"] for record in reference]
    flip = first_flip(reference, records)
    for expected, actual in zip(reference, records, strict=True):
        before = expected["step"] < flip
        tolerance = loss if before else LOSS_AFTER_FLIP
        assert actual["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        tolerance = TOLERANCE if before else GRAD_NORM_AFTER_FLIP
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    return flip
