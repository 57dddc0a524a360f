"""The policy for bad losses, without training."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.config.schema import TrainConfig
from mone_megatron.train.health.faults import SPIKE_LEAST, LossFaults


def test_spikes_need_ten_good_losses() -> None:
    faults = LossFaults(TrainConfig(spike_factor=2.0))
    for step in range(1, SPIKE_LEAST):
        faults.accept(step, 3.0)
    assert faults.judge(SPIKE_LEAST, 100.0) is None
    faults.accept(SPIKE_LEAST, 3.0)
    assert faults.judge(SPIKE_LEAST + 1, 6.0) is None
    fault = faults.judge(SPIKE_LEAST + 1, 6.001)
    assert fault is not None
    assert "train.spike_factor=2" in fault


def test_the_median_is_of_the_last_fifty() -> None:
    faults = LossFaults(TrainConfig(spike_factor=2.0))
    for step in range(1, 101):
        faults.accept(step, 100.0 if step <= 50 else 1.0)
    assert faults.judge(101, 2.5) is not None


def test_without_a_factor_only_what_is_not_finite_is_refused() -> None:
    faults = LossFaults(TrainConfig())
    for step in range(1, 60):
        faults.accept(step, 1.0)
    assert faults.judge(60, 1e30) is None
    for loss in (math.nan, math.inf, -math.inf):
        assert faults.judge(60, loss) == f"the loss is {loss}"


def test_a_good_step_ends_a_row_of_skips() -> None:
    faults = LossFaults(TrainConfig(on_bad_loss="skip", max_skips=2))
    for first in (1, 4, 7):
        assert faults.decide(first, "bad") == "skip"
        assert faults.decide(first + 1, "bad") == "skip"
        faults.accept(first + 2, 1.0)
    faults.decide(10, "bad")
    faults.decide(11, "bad")
    with pytest.raises(FloatingPointError, match=r"step 12: bad .*train\.max_skips=2"):
        faults.decide(12, "bad")


def test_a_step_rolled_back_over_is_left_out_without_counting() -> None:
    faults = LossFaults(TrainConfig(on_bad_loss="rollback", max_rollbacks=1))
    assert faults.decide(5, "bad") == "rollback"
    faults.rolled_back(3)
    assert faults.judge(4, 1.0) is None
    left_out = faults.judge(5, 1.0)
    assert left_out is not None
    assert faults.decide(5, left_out) == "skip"
    with pytest.raises(FloatingPointError, match=r"step 6: bad .*train\.max_rollbacks=1"):
        faults.decide(6, "bad")


@given(
    losses=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=80),
    back=st.integers(0, 80),
)
def test_after_a_rollback_the_same_losses_are_judged_the_same(
    losses: list[float], back: int
) -> None:
    back = min(back, len(losses))
    faults = LossFaults(TrainConfig(on_bad_loss="rollback", spike_factor=1.5))

    def verdicts(first: int) -> list[bool]:
        found = []
        for step in range(first, len(losses) + 1):
            bad = faults.judge(step, losses[step - 1]) is not None
            found.append(bad)
            if not bad:
                faults.accept(step, losses[step - 1])
        return found

    before = verdicts(1)
    faults.rolled_back(back)
    assert verdicts(back + 1) == before[back:]
