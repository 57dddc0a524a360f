"""Who is at fault, from what the ranks tell; where a rank is. Real hangs: tests/faults."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mone_megatron.config.load import compose
from mone_megatron.parallel.groups import open_groups
from mone_megatron.testing.processes import Processes
from mone_megatron.train.health.heartbeats import (
    Heartbeat,
    find_culprits,
    joined_collectives,
    place_of,
    program_place,
)
from mone_megatron.train.health.watchdog import _chain, _in_a_collective

WORLD, DATA = "0 (default_pg)", "7 (DATA_PARALLEL_GROUP)"


def beat(rank: int, **changes: Any) -> Heartbeat:
    standard: dict[str, Any] = {
        "rank": rank,
        "host": "node",
        "pid": 100 + rank,
        "alive": 5,
        "phase": "after step 3",
        "beats": 4,
        "line": "train/step.py:1 in attempt",
        "call": "all_reduce",
        "stack": [],
        "joined": {WORLD: 10},
    }
    return Heartbeat(**(standard | changes))


def culprits(
    *beats: Heartbeat, stopped: tuple[int, ...] = (), size: int | None = None
) -> list[int]:
    after = {one.rank: Heartbeat.from_json(one.to_json()) for one in beats}
    before = {
        rank: beat(rank, alive=one.alive - (rank not in stopped)) for rank, one in after.items()
    }
    found = find_culprits(before, after, size=size or len(beats), asking=0, seconds=5.0)
    assert all(f"rank {one.rank} " in one.why for one in found)
    return [one.rank for one in found]


def test_a_rank_that_does_not_run_is_at_fault_before_all_others() -> None:
    assert culprits(beat(0), beat(1), beat(2, joined={WORLD: 9}), stopped=(1,)) == [1]
    assert culprits(beat(0), beat(1), size=3) == [2]


def test_a_rank_that_left_is_at_fault_unless_it_lost_another() -> None:
    left = beat(1, ended="ValueError: no")
    assert culprits(beat(0), left, beat(2, ended="RuntimeError: gloo", bereft=True)) == [1]


def test_the_rank_behind_is_at_fault_and_not_who_waits_for_one_that_waits() -> None:
    # 3 waits for 2, which waits for 1, which computes.
    assert culprits(
        beat(0, joined={WORLD: 10}),
        beat(1, joined={WORLD: 9}, call=None),
        beat(2, joined={WORLD: 10, DATA: 4}),
        beat(3, joined={WORLD: 10, DATA: 5}),
    ) == [1]


def test_of_ranks_that_wait_for_each_other_the_one_most_wait_for_is_at_fault() -> None:
    ahead = beat(1, joined={WORLD: 9, DATA: 5})
    pair = beat(0, joined={WORLD: 10, DATA: 4})
    assert culprits(pair, ahead, beat(2), beat(3)) == [1]


@pytest.mark.parametrize("skipper", [0, 1])
def test_of_two_that_wait_for_each_other_the_one_further_on_left_one_out(skipper: int) -> None:
    stack = [("loop.py train", 10), ("step.py attempt", 20)]
    further = [("loop.py train", 10), ("step.py attempt", 30), ("clip.py norm", 2)]
    late = beat(1 - skipper, joined={WORLD: 10, DATA: 4}, stack=stack)
    skipped = beat(skipper, joined={WORLD: 9, DATA: 5}, stack=further)
    assert culprits(*sorted([late, skipped], key=lambda one: one.rank)) == [skipper]


def test_without_a_rank_behind_the_one_in_no_collective_is_at_fault() -> None:
    assert culprits(beat(0), beat(1, call=None)) == [1]
    assert culprits(beat(0), beat(1)) == []
    # Stages send and receive different numbers of times.
    stages = "3 (PIPELINE_MODEL_PARALLEL_GROUP)"
    assert culprits(beat(0, joined={stages: 8}), beat(1, joined={stages: 16})) == []


def test_a_thread_outside_collectives_is_at_its_innermost_line_of_ours() -> None:
    ready, done = threading.Event(), threading.Event()

    def compute() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    ready.wait()
    try:
        place = place_of(sys._current_frames()[thread.ident or 0])
    finally:
        done.set()
        thread.join()
    assert "test_watchdog.py" in place.line
    assert place.line.endswith("in compute")
    assert place.call is None


def _started() -> dict[str, int]:
    """What two collectives of a group add to the counts."""
    group = dist.new_group([0, 1])
    before = joined_collectives()
    values = torch.ones(2)
    dist.all_reduce(values, group=group)
    dist.broadcast(values, src=0, group=group)
    after = joined_collectives()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def test_groups_count_what_a_rank_started(two_processes: Processes) -> None:
    for counts in two_processes.run(_started):
        assert list(counts.values()) == [2]


def _raise_ours() -> None:
    raise RuntimeError("ours")


def _raise_from_a_collective() -> None:
    try:
        raise dist.DistNetworkError("gone")
    except RuntimeError as error:
        raise ValueError("saving failed") from error


def test_an_error_of_our_own_is_not_a_failed_collective() -> None:
    with pytest.raises(RuntimeError) as ours:
        _raise_ours()
    assert not any(map(_in_a_collective, _chain(ours.value)))
    with pytest.raises(ValueError, match="saving") as lost:
        _raise_from_a_collective()
    assert any(map(_in_a_collective, _chain(lost.value)))


def _pipeline_group_is_called() -> str:
    from megatron.core import parallel_state

    config = compose(["experiment=tiny_mone", "device=cpu", "parallel.pipeline=2"])
    open_groups(config.parallel, config.train, timeout_seconds=300)
    name: str = parallel_state.get_pipeline_model_parallel_group().group_desc
    return name


def test_the_group_that_is_not_compared_is_megatrons(two_processes: Processes) -> None:
    names = two_processes.run(_pipeline_group_is_called)
    assert names == ["PIPELINE_MODEL_PARALLEL_GROUP"] * 2


def test_a_frame_between_two_lines_has_a_place() -> None:
    """Python gives it no line number; the thread that beats must not fail of it."""
    code = SimpleNamespace(co_filename=__file__, co_name="train")
    frame: Any = SimpleNamespace(f_code=code, f_lineno=None, f_back=None)
    assert str(place_of(frame)).endswith("test_watchdog.py:0 in train")
    assert program_place(frame) == [("test_watchdog.py train", 0)]
