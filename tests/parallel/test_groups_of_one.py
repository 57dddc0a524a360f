"""A group of one rank exchanges nothing; larger ones go on as they did."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from torch.profiler import ProfilerActivity, profile

from mone_megatron.parallel import groups_of_one
from mone_megatron.testing.processes import Processes

# Names of torch's profiler for what reaches gloo.
_COLLECTIVE = "c10d::"


def collectives_of(size: int) -> tuple[list[list[float]], list[str]]:
    """What each collective gives within groups of this size, and what of it reached gloo."""
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 2, size)]
    group = groups[dist.get_rank() // size]
    given = torch.arange(2.0) + dist.get_rank()
    found = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for async_op in (False, True):
            summed, spread = given.clone(), torch.empty(2 // size)
            gathered, own = torch.empty(2 * size), given.clone()
            handles = [
                dist.all_reduce(summed, group=group, async_op=async_op),
                dist.all_gather_into_tensor(gathered, given, group=group, async_op=async_op),
                dist.reduce_scatter_tensor(spread, given, group=group, async_op=async_op),
                # Into the memory that it comes from, as the distributed optimizer does.
                dist.all_reduce(own, dist.ReduceOp.MAX, group, async_op),
            ]
            for handle in handles:
                assert (handle is None) is not async_op
                if handle is not None:
                    handle.wait()
            found += [one.tolist() for one in (summed, gathered, spread, own)]
    assert found[:4] == found[4:]
    names = {event.key for event in profiler.key_averages() if event.key.startswith(_COLLECTIVE)}
    return found[:4], sorted(names)


def test_a_rank_alone_keeps_what_it_has_and_gloo_is_not_asked(two_processes: Processes) -> None:
    for rank, (found, names) in enumerate(two_processes.run(collectives_of, size=1)):
        own = [0.0 + rank, 1.0 + rank]
        assert found == [own, own, own, own]
        assert names == []


def test_two_ranks_exchange_as_before(two_processes: Processes) -> None:
    for rank, (found, names) in enumerate(two_processes.run(collectives_of, size=2)):
        assert found == [[1.0, 3.0], [0.0, 1.0, 1.0, 2.0], [[1.0], [3.0]][rank], [1.0, 2.0]]
        assert len(names) == 3


def test_megatron_core_has_bound_ours() -> None:
    assert set(groups_of_one._COLLECTIVES) == {
        "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor",
    }  # fmt: skip
    assert param_and_grad_buffer.dist_all_gather_func is dist.all_gather_into_tensor
    assert param_and_grad_buffer.dist_reduce_scatter_func is dist.reduce_scatter_tensor
    assert dist.all_reduce.__module__ == "torch.distributed.distributed_c10d"
    assert hasattr(dist.all_reduce, "__wrapped__")


def torch_still_copies() -> int:
    """How many collectives of torch's own reach gloo in a group of one rank."""
    group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        dist.all_reduce.__wrapped__(torch.ones(3), group=group)
    return sum(event.count for event in profiler.key_averages() if "c10d::" in event.key)


def test_torch_still_asks_gloo(two_processes: Processes) -> None:
    assert min(two_processes.run(torch_still_copies)) >= 1


@pytest.mark.parametrize("shape", [(2, 3), (6,)])
def test_a_copy_takes_the_shape_it_is_written_in(shape: tuple[int, ...]) -> None:
    output = torch.empty(shape)
    groups_of_one._copied(output, torch.arange(6.0), False)
    assert output.flatten().tolist() == list(range(6))
