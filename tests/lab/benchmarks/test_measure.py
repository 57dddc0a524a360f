from __future__ import annotations

import pytest

from mone_megatron.lab.benchmarks.measure import Spread, difference, interleave, ratio


def test_actions_alternate_after_warm_up() -> None:
    called: list[str] = []
    samples = interleave(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2, warmup=1
    )
    assert "".join(called) == "abbaab"
    assert {name: len(values) for name, values in samples.clock.items()} == {"a": 2, "b": 2}


def test_a_measurement_of_several_calls_is_of_one() -> None:
    called: list[int] = []
    interleave({"a": lambda: called.append(1)}, repeats=2, warmup=0, calls=3)
    assert len(called) == 6


def test_ratios_and_differences_are_of_neighbours() -> None:
    samples = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}
    assert ratio(samples, "a", "b") == Spread(2.0, 1.0, 3.0)
    assert difference(samples, "a", "b") == Spread(1.0, 0.0, 20.0)
    assert str(Spread(1.0, 0.5, 2.25)) == "1.000 (0.500..2.250)"


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"calls": 0}, {"warmup": -1}])
def test_nothing_to_measure_is_an_error(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        interleave({}, **({"repeats": 1, "warmup": 0} | wrong))
