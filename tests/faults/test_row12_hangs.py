"""Row 12: a rank that stops, stays away, leaves a collective out or dies, named by the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from faults_helpers import (
    PATIENCE,
    SMALL,
    Workers,
    end,
    launch,
    send,
    steps,
    wait_until,
)
from faults_table import Tally

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.ports import free_ports
from mone_megatron.train.health.signals import HANG_EXIT_CODE

Count = Callable[[int, str], AbstractContextManager[Tally]]
HANGING_RUN = Path(__file__).with_name("hanging_run.py")
# Long enough that no rank of a busy machine is as late as that by itself.
TIMEOUT = 15
RUN = (*SMALL, "train.steps=50000", f"device.timeout_seconds={TIMEOUT}")
# Rank stopped, ranks in the run.
STOPPED = [(1, 2)]
STOPPED_IN_FULL = [(0, 2), (1, 2), (0, 4), (3, 4)]
AWAY = [("skips", 1, 2)]
AWAY_IN_FULL = [
    (kind, rank, 2) for kind in ("skips", "sleeps", "spins", "raises") for rank in (0, 1)
] + [("skips", 2, 4), ("sleeps", 3, 4)]


def named(said: str, rank: int) -> bool:
    """Whether the ranks that speak name this one, and no other, as the one at fault."""
    faults = re.findall(r"^error: (?:hang|rank lost): (.*?)\. Found by ", said, re.MULTILINE)
    ranks = [int(one) for fault in faults for one in re.findall(r"(?:^|; )rank (\d+) ", fault)]
    return set(ranks) == {rank}


def kept(folder: Path, rank: int) -> bool:
    """Whether this rank's stacks are there, down to the step."""
    file = folder / "hangs" / f"rank_{rank:05d}.txt"
    return file.exists() and "train/step.py" in file.read_text()


def wait_for_others(workers: Workers, rank: int) -> None:
    """Until every rank but this has ended."""
    for other, worker in enumerate(workers):
        if other != rank:
            worker.wait(PATIENCE)


@pytest.mark.parametrize("case", range(len(STOPPED_IN_FULL)))
def test_a_rank_is_stopped(tmp_path: Path, tally: Count, full: bool, case: int) -> None:
    cases = STOPPED_IN_FULL if full else STOPPED
    if case >= len(cases):
        pytest.skip("only with --faults-full")
    rank, size = cases[case]
    with tally(12, "a rank stopped (SIGSTOP): the others exit, naming it") as t:
        workers = launch(tmp_path, *RUN, processes=size)
        wait_until(lambda: len(steps(tmp_path)) > 2, workers)
        send(workers[rank], signal.SIGSTOP)
        wait_for_others(workers, rank)
        codes, said = end(workers, 0)
        others = [other for other in range(size) if other != rank]
        held = all(codes[other] == HANG_EXIT_CODE for other in others)
        held &= named(said, rank) and all(kept(tmp_path, other) for other in others)
        held &= json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
        t.check(held, f"rank {rank} of {size}: {codes}\n{said}")


@pytest.mark.parametrize("case", range(len(AWAY_IN_FULL)))
def test_a_rank_stays_away(tmp_path: Path, tally: Count, full: bool, case: int) -> None:
    cases = AWAY_IN_FULL if full else AWAY
    if case >= len(cases):
        pytest.skip("only with --faults-full")
    kind, rank, size = cases[case]
    command = (str(HANGING_RUN), kind, str(rank), "4")
    with tally(12, "a rank skips a collective, sleeps, spins or leaves: all exit, naming it") as t:
        workers = launch(tmp_path, *RUN, processes=size, command=command)
        codes, said = end(workers)
        # One that leaves has its own error and code.
        asked = [code for number, code in enumerate(codes) if (number, kind) != (rank, "raises")]
        held = set(asked) == {HANG_EXIT_CODE} and codes[rank] in (HANG_EXIT_CODE, 1)
        held &= named(said, rank)
        held &= kind == "raises" or all(kept(tmp_path, number) for number in range(size))
        t.check(held, f"{kind}, rank {rank} of {size}: {codes}\n{said}")


@pytest.mark.parametrize("case", range(2))
def test_a_rank_is_killed(tmp_path: Path, tally: Count, full: bool, case: int) -> None:
    cases = [(1, 2), (0, 2)] if full else [(1, 2)]
    if case >= len(cases):
        pytest.skip("only with --faults-full")
    rank, size = cases[case]
    with tally(12, "a rank killed: the others exit, naming it") as t:
        workers = launch(tmp_path, *RUN, processes=size)
        wait_until(lambda: len(steps(tmp_path)) > 2, workers)
        send(workers[rank], signal.SIGKILL)
        codes, said = end(workers)
        held = codes[1 - rank] == HANG_EXIT_CODE and named(said, rank)
        held &= kept(tmp_path, 1 - rank)
        t.check(held, f"rank {rank} of {size}: {codes}\n{said}")


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_under_torchrun_no_process_stays(tmp_path: Path, tally: Count, full: bool) -> None:
    """Its agent kills what is stopped, half a minute after it asked."""
    if not full:
        pytest.skip("only with --faults-full")
    with tally(12, "a rank stopped under torchrun: every process gone") as t:
        for stopped in (0, 1):
            folder = tmp_path / str(stopped)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
            launcher += ["--master-port", str(free_ports(1)[0]), "-m", "mone_megatron.pretrain"]
            agent = subprocess.Popen(
                [*launcher, *RUN, f"run.dir={folder}"],
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            wait_until(lambda folder=folder: len(steps(folder)) > 2, [agent])  # type: ignore[misc]
            ranks = {rank_of(pid): pid for pid in children(agent.pid)}
            os.kill(ranks[stopped], signal.SIGSTOP)
            (code,), said = end([agent])
            gone = not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
            held = code == 1 and gone and named(said, stopped) and kept(folder, 1 - stopped)
            t.check(held, f"rank {stopped}: {code}, all gone: {gone}\n{said}")


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(int(one[5:]) for one in variables if one.startswith("RANK="))
