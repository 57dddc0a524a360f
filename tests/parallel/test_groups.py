from __future__ import annotations

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.parallel.groups import close_groups, open_expert_sources, open_groups
from mone_megatron.testing.processes import Processes


def _sources(parallel: ParallelConfig) -> tuple[tuple[int, ...], list[int], int]:
    open_groups(parallel, TrainConfig(), timeout_seconds=60)
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
