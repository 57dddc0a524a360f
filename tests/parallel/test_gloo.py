"""Gloo groups share a device: no thread wakes for each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from mone_megatron.testing.processes import Processes

GROUPS = 20


def _threads(prepare: str) -> int:
    """Of a process with many groups of which each was used, more than with one."""
    code = textwrap.dedent(f"""
        import os
        import torch
        import torch.distributed as dist
        {prepare}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        before = len(os.listdir("/proc/self/task"))
        for _ in range({GROUPS}):
            dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
        print(len(os.listdir("/proc/self/task")) - before)
    """)
    return int(_said(code))


def _said(code: str) -> str:
    """What a Python process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.strip()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_torch_still_makes_a_polling_thread_a_group_and_we_do_not() -> None:
    # Two workers a group, which sleep; and torch's device.
    assert _threads("") == 3 * GROUPS
    share = (
        "from mone_megatron.parallel.gloo import share_gloo_devices;"
        "share_gloo_devices(); share_gloo_devices()"
    )
    assert _threads(share) == 2 * GROUPS


def use_many_groups() -> list[float]:
    """Every kind of operation over overlapping groups."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = [dist.new_group(list(range(size))) for _ in range(6)]
    alone = [dist.new_group([one]) for one in range(size)][rank]
    results = []
    for number, group in enumerate(everyone):
        value = torch.full((4,), float(rank + number))
        dist.all_reduce(value, group=group)
        parts = [torch.empty(1) for _ in range(size)]
        dist.all_gather(parts, torch.tensor([float(rank)]), group=group)
        mixed = torch.empty(size)
        dist.all_to_all_single(mixed, torch.arange(size) + 10.0 * rank, group=group)
        passed = torch.tensor([float(rank)])
        if rank == 0:
            dist.send(passed, 1, group=group)
        elif rank == 1:
            dist.recv(passed, 0, group=group)
        dist.barrier(group=group)
        own = torch.ones(1)
        dist.all_reduce(own, group=alone)
        results += [float(value[0]), *map(float, parts), *mixed.tolist(), float(passed), float(own)]
    return results


def test_groups_that_share_a_device_do_not_mix(two_processes: Processes) -> None:
    for _ in range(2):  # again, after all groups were closed
        first, second = two_processes.run(use_many_groups)
        for number in range(6):
            mine, theirs = (values[7 * number : 7 * number + 7] for values in (first, second))
            common = [1.0 + 2 * number, 0.0, 1.0]
            assert mine == [*common, 0.0, 10.0, 0.0, 1.0]
            assert theirs == [*common, 1.0, 11.0, 0.0, 1.0]


def test_a_forked_process_does_not_use_its_parents_device() -> None:
    code = textwrap.dedent("""
        import os
        import torch
        import torch.distributed as dist
        from mone_megatron.parallel.gloo import share_gloo_devices

        def use_a_group():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
            dist.destroy_process_group()

        share_gloo_devices()
        use_a_group()
        child = os.fork()
        if child == 0:
            use_a_group()
            from torch.distributed.distributed_c10d import ProcessGroupGloo
            os._exit(len(ProcessGroupGloo._devices))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    # Its own beside its parent's.
    assert _said(code) == "2"
