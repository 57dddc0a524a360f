from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from mone_megatron.testing.processes import Processes, RankFailedError, run_in_processes


def _sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total.item()


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("a missing thing")
    dist.barrier()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(600)


def _hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def _backend_is_installed() -> bool:
    return "megatron.core" in sys.modules and torch.cuda.current_device().type == "cpu"


def test_processes_run_functions_and_recover(two_processes: Processes) -> None:
    first = two_processes.run(_sum_of_ranks, 10)
    assert [(rank, total) for rank, _, total in first] == [(0, 21.0), (1, 21.0)]
    assert len({pid for _, pid, _ in first} | {os.getpid()}) == 3
    again = two_processes.run(_sum_of_ranks, offset=0)
    assert [pid for _, pid, _ in again] == [pid for _, pid, _ in first]
    assert two_processes.run(_backend_is_installed) == [True, True]


def test_failures_are_told_at_once_and_the_processes_start_again(two_processes: Processes) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2 failed.*KeyError.*a missing"):
        two_processes.run(_fail_on_rank_1)
    assert two_processes.run(_sum_of_ranks, 0)[0][2] == 1.0
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed: it ended with code 7"):
        two_processes.run(_die_on_rank_1)
    assert time.monotonic() - start < two_processes.timeout_seconds


def test_ranks_that_do_not_return_are_named() -> None:
    with (
        Processes(1, timeout_seconds=0.5) as processes,
        pytest.raises(RankFailedError, match=r"ranks \[0\] of 1 did not return in 0.5 s"),
    ):
        processes.run(_hang_on_rank_0)


def test_run_in_processes_with_one_rank() -> None:
    assert run_in_processes(1, _sum_of_ranks, 5)[0][2] == 5.0
