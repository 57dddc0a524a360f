from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.megatron_release import megatron_release
from mone_megatron.parallel.groups import close_groups, open_expert_sources, open_groups
from mone_megatron.testing.processes import Processes


def _sources(parallel: ParallelConfig) -> tuple[tuple[int, ...], list[int], int]:
    open_groups(parallel, TrainConfig(), timeout_seconds=300)
    found = open_expert_sources(parallel)
    shared = dist.get_process_group_ranks(found.shared_group) if found.shared_group else []
    return found.microbatch_of_source, shared, parallel_state.get_data_parallel_rank()


@pytest.mark.parametrize(
    ("parallel", "sources", "shared"),
    [
        (ParallelConfig(), (0,), [[0], [1], [2], [3]]),
        (ParallelConfig(expert=4), (0, 1, 2, 3), None),
        (ParallelConfig(tensor=2, expert=4), (0, 0, 1, 1), None),
        (ParallelConfig(tensor=2, expert=2), (0, 0), None),
        (ParallelConfig(tensor=2), (0,), [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (ParallelConfig(tensor=4, expert=2), (0, 0), [[0, 2], [1, 3], [0, 2], [1, 3]]),
        (ParallelConfig(pipeline=2, tensor=2), (0,), [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (ParallelConfig(pipeline=2, expert=2), (0, 1), None),
    ],
)
def test_sources_of_an_experts_tokens(
    four_processes: Processes,
    parallel: ParallelConfig,
    sources: tuple[int, ...],
    shared: list[list[int]] | None,
) -> None:
    for rank, result in enumerate(four_processes.run(_sources, parallel)):
        alone = parallel.tensor == parallel.expert == 1
        assert result[0] == sources
        assert result[1] == (shared[rank] if shared and not alone else [])


def test_closing_what_was_never_opened() -> None:
    close_groups()
    close_groups()


def _made(world: int, ranks: str, *sizes: str) -> dict[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fake_groups.py"), str(world), ranks, *sizes],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return made


# World, sizes, a rank's groups: of megatron-core alone, shared, connected at once; of those that it
# is in, shared. docs/gpu.md has them.
COUNTS = [
    (8, ("expert=8",), 80, 4, 11, 4),
    (64, ("expert=8",), 549, 19, 82, 5),
    (64, ("tensor=4", "pipeline=2", "expert=8"), 321, 128, 191, 11),
    (8, ("tensor=2", "context=2", "expert=2"), 70, 28, 35, 10),
    (8, ("pipeline=4", "expert=2"), 74, 20, 27, 8),
]


@pytest.mark.parametrize(("world", "sizes", "plain", "shared", "connected", "joined"), COUNTS)
def test_groups_of_the_same_ranks_are_made_once(
    world: int, sizes: tuple[str, ...], plain: int, shared: int, connected: int, joined: int
) -> None:
    ranks = [0, 1, world // 2, world - 1]
    made = _made(world, ",".join(map(str, ranks)), *sizes)
    for name, count in (("shared", shared), ("connected", connected)):
        assert [len(one["asked"]) for one in made[name]] == [count] * len(ranks)
    # 0.19 asks for groups that 0.16 has not; all of them are equal to others.
    asked = {len(one["asked"]) for one in made["plain"]}
    assert asked == {plain} or (megatron_release()[:2] > (0, 16) and min(asked) > plain)
    # No more on others: only the first and the last stage are in a group for tied embeddings.
    assert max(one["in"] for one in made["shared"]) == made["shared"][0]["in"] == joined
    for alone, ours, at_once in zip(made["plain"], made["shared"], made["connected"], strict=True):
        # megatron-core finds what it would have found.
        assert ours["groups"] == at_once["groups"] == alone["groups"]
        # All ranks ask for the same groups in the same order; of one rank, only where all must.
        several = [group for group in ours["asked"] if len(group) > 1]
        assert several == [group for group in made["shared"][0]["asked"] if len(group) > 1]
        assert at_once["asked"] == made["connected"][0]["asked"]
        assert len(at_once["asked"]) - len(several) == world
        assert len(ours["asked"]) - len(several) == 1


def test_groups_that_send_at_the_same_time_are_two() -> None:
    """Experts exchange tokens while gradients of the layer behind are reduced."""
    (made,) = _made(8, "0", "expert=8")["shared"]
    gradients, experts = "_DATA_PARALLEL_GROUP", "_EXPERT_MODEL_PARALLEL_GROUP"
    assert made["groups"][gradients] == made["groups"][experts] == list(range(8))
    assert made["numbers"][gradients] != made["numbers"][experts]
    assert made["numbers"]["_DATA_PARALLEL_GROUP_WITH_CP"] == made["numbers"][gradients]
    assert made["numbers"]["_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"] == made["numbers"][experts]
