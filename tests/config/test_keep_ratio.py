"""The keep ratio as a function of the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.schema import MoNEConfig
from mone_megatron.config.validate import validate

KEY = "mone.keep_ratio_schedule"


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    keep_ratio=st.floats(0.01, 1),
    rise=st.floats(0, 1),
    steps=st.integers(1, 50),
)
def test_it_goes_down_and_ends_where_it_should(
    kind: str, keep_ratio: float, rise: float, steps: int
) -> None:
    start = keep_ratio + (1 - keep_ratio) * rise
    mone = MoNEConfig(
        keep_ratio=keep_ratio,
        keep_ratio_schedule=kind,  # type: ignore[arg-type]
        keep_ratio_start=start,
        keep_ratio_steps=steps,
    )
    ratios = [mone.keep_ratio_at(step) for step in range(steps + 3)]
    assert ratios[0] == ratios[1] == start  # step 0 is before the first
    assert ratios[-2:] == [keep_ratio, keep_ratio]
    assert all(keep_ratio - 1e-9 <= ratio <= start + 1e-9 for ratio in ratios)
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(ratios))


def test_the_middle_of_each_kind() -> None:
    mone = MoNEConfig(keep_ratio=0.2)
    for kind, quarter in (("linear", 0.8), ("cosine", 1 - 0.8 * (1 - 2**-0.5) / 2)):
        scheduled = replace(mone, keep_ratio_schedule=kind, keep_ratio_steps=8)
        assert scheduled.keep_ratio_at(3) == pytest.approx(quarter)
        assert scheduled.keep_ratio_at(5) == pytest.approx(0.6)
    assert [mone.keep_ratio_at(step) for step in (0, 1, 9)] == [0.2] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mone.keep_ratio_steps=5"], "steps: 5 needs mone.keep_ratio_schedule=linear or cosine"),
        ([f"{KEY}=linear"], "mone.keep_ratio_steps: 0 is not between 1 and train.steps=20"),
        ([f"{KEY}=cosine", "mone.keep_ratio_steps=21"], "steps: 21 is not between 1 and"),
        (
            [f"{KEY}=linear", "mone.keep_ratio_steps=5", "mone.keep_ratio_start=0.1"],
            "mone.keep_ratio_start: 0.1 is not between mone.keep_ratio=0.25 and 1",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(compose(["experiment=tiny_mone", *overrides]), world_size=1)
