"""Forked children begin, and leave alone what belongs to threads of their parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A process group that is garbage at the fork, or becomes it in the child, which looks for some.
GARBAGE = """
import gc, torch.distributed as dist
from torch.distributed import distributed_c10d
from mone_megatron.forked_children import FORK

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

process = FORK.Process(target=child)
process.start()
process.join(300)
print("ENDED", process.exitcode)
if process.exitcode is None:
    process.kill()
"""


@pytest.mark.parametrize("kept", [False, True], ids=["garbage", "kept"])
def test_a_child_does_not_collect_groups_of_its_parent(kept: bool) -> None:
    """It would wait for their threads, which it does not have, or end in a SIGSEGV."""
    assert "ENDED 0" in _run(GARBAGE.format(kept=kept))


# Some children, by their number, never begin: as if they waited for a lock of their parent's.
HANGING = """
import os, time
from mone_megatron import forked_children

forked = 0
def count():
    global forked
    forked += 1
os.register_at_fork(before=count, after_in_child=lambda: forked in {hanging} and time.sleep(600))
forked_children._PATIENCE = {patience}

def descriptors():
    return len(os.listdir("/proc/self/fd"))
"""
A_CHILD = """
before = descriptors()
process = forked_children.FORK.Process(target=print, args=("done",), kwargs=dict(flush=True))
try:
    process.start()
    process.join()
    process.close()
except OSError as error:
    print("REFUSED", error.strerror)
print("FORKED", forked, descriptors() - before)
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("NO CHILD IS LEFT")
"""
RUN = """
from mone_megatron.config.load import compose
from mone_megatron.pretrain import pretrain

print("ENDED", pretrain(compose([
    "experiment=tiny_mone", "device=cpu", "model.num_layers=1", "train.steps=1",
    "data.max_megabytes=0.2", "data.num_workers=1", "checkpoint.interval=1", "logging.report=false",
    "logging.wandb.mode=disabled", "run.dir={folder}",
])))
print("FORKED", forked)
"""


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_child_is_forked_where_one_does_not_begin() -> None:
    said = _run(HANGING.format(hanging=[1, 2], patience=(0.3, 0.3, 300)) + A_CHILD)
    assert said.splitlines() == ["done", "FORKED 3 0", "NO CHILD IS LEFT"]


def test_children_that_never_begin_are_an_error() -> None:
    said = _run(HANGING.format(hanging=[1, 2], patience=(0.1, 0.1)) + A_CHILD)
    refused = "REFUSED 2 forked processes did not begin, and were killed"
    assert said.splitlines() == [refused, "FORKED 2 0", "NO CHILD IS LEFT"]


def test_a_run_loads_and_saves_though_first_processes_do_not_begin(tmp_path: Path) -> None:
    said = _run(HANGING.format(hanging=[1, 3], patience=(0.3, 300)) + RUN.format(folder=tmp_path))
    assert "ENDED 0\nFORKED 4" in said, said
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()
