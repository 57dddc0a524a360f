"""Forked children leave alone what belongs to threads of their parent."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process group that is garbage at the fork, or becomes it in the child, which looks for some.
GARBAGE = """
import gc, multiprocessing, torch.distributed as dist
from torch.distributed import distributed_c10d
import {module}

class Node: pass

gc.disable()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
node = Node()
node.itself, node.group = node, distributed_c10d._get_default_group()
dist.destroy_process_group()
node = node if {kept} else None

def child():
    global node
    node = None
    gc.collect()

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
print("ENDED", process.exitcode)
if process.exitcode is None:
    process.kill()
"""


@pytest.mark.parametrize("kept", [False, True], ids=["garbage", "kept"])
@pytest.mark.parametrize(
    "module", ["mone_megatron.data.loader", "mone_megatron.train.resume.writing"]
)
def test_a_child_does_not_collect_groups_of_its_parent(module: str, kept: bool) -> None:
    """It would wait for their threads, which it does not have, or end in a SIGSEGV."""
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE.format(module=module, kept=kept)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "ENDED 0" in done.stdout, done.stdout + done.stderr
