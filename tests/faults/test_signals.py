"""Row 10: requests to stop: real signals to real processes, and the time limit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import faults_helpers
import pytest
import torch
from faults_helpers import PATIENCE, QUIET, end, saved_steps, steps, wait_until
from faults_table import Tally

from mone_megatron.testing.warm_start import WarmProcess
from mone_megatron.train.health.signals import (
    INTERRUPTED_EXIT_CODE,
    RESUME_EXIT_CODE,
    StopRequest,
    exit_code,
)

ENDLESS = ("experiment=tiny_mone", "device=cpu", *QUIET, "model.num_layers=2", "train.steps=50000")
SAVING = ("checkpoint.interval=50000", "checkpoint.resume=auto")
CPU = torch.device("cpu")


def launch(folder: Path, *overrides: str, processes: int = 1) -> list[WarmProcess]:
    return faults_helpers.launch(folder, *ENDLESS, *overrides, processes=processes)


def assert_saved(folder: Path) -> None:
    """At the last step, with the records up to it, and marked as interrupted."""
    done = steps(folder)
    assert done == list(range(1, len(done) + 1))
    assert done[-1:] == saved_steps(folder)[-1:]
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not list((folder / "checkpoints").glob(".*partial*"))


def children(worker: WarmProcess) -> list[int]:
    """Its loader processes, and those that write checkpoints."""
    with contextlib.suppress(FileNotFoundError):
        text = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text()
        return [int(number) for number in text.split()]
    return []


def handles_signals(worker: WarmProcess) -> bool:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


@dataclass(frozen=True)
class Moment:
    """When to ask, seen from outside."""

    overrides: tuple[str, ...]
    reached: Callable[[Path, list[WarmProcess]], object]


def is_saving(folder: Path, workers: list[WarmProcess]) -> object:
    return [*(folder / "checkpoints").glob(".step_*.partial-*")]


EVERY_STEP = ("checkpoint.interval=1", "checkpoint.resume=auto")
MOMENTS = {
    # From when the signal is handled, before there is a model, to the first step.
    "start-up": Moment(SAVING, lambda folder, workers: all(map(handles_signals, workers))),
    "a step": Moment(SAVING, lambda folder, workers: steps(folder)),
    # Each evaluation starts loader processes of its own.
    "an evaluation": Moment(
        (*SAVING, "train.eval_interval=1", "train.eval_steps=60"),
        lambda folder, workers: min(len(children(worker)) for worker in workers) >= 2,
    ),
    "a save": Moment(EVERY_STEP, is_saving),
    "an asynchronous save": Moment((*EVERY_STEP, "checkpoint.async_save=true"), is_saving),
}
CODES = {
    signal.SIGINT: INTERRUPTED_EXIT_CODE,
    signal.SIGTERM: INTERRUPTED_EXIT_CODE,
    signal.SIGUSR1: RESUME_EXIT_CODE,
}


def wrong(folder: Path, moment: str, number: int, everyone: bool, processes: int) -> str:
    """Ask once at that moment, with a loader process a rank; what is not as promised."""
    settings = MOMENTS[moment]
    workers = launch(folder, *settings.overrides, "data.num_workers=1", processes=processes)
    wait_until(lambda: settings.reached(folder, workers), workers)
    if moment == "a step":
        time.sleep(random.Random(str(folder.name)).uniform(0, 0.2))
    victims = workers if everyone else workers[-1:]
    for worker in victims:
        for process in (*(children(worker) if everyone else ()), worker.pid):
            with contextlib.suppress(ProcessLookupError):  # a child that has just ended
                os.kill(process, number)
    done = len(steps(folder))
    codes, said = end(workers)
    if codes != [CODES[signal.Signals(number)]] * processes:
        return f"exit codes {codes}: {said}"
    after = steps(folder)
    # One may have been under way, its request not yet read.
    if len(after) > done + 2 or (moment == "start-up" and after != [1]):
        return f"asked after step {done}, it stopped after {len(after)}"
    try:
        assert_saved(folder)
    except AssertionError as error:
        return f"not all was saved: {error}"
    return ""


# Moment, signal, every process or one rank, ranks. (SIGINT: tests/integration/test_pretrain.py.)
CASES = [
    ("a step", signal.SIGTERM, False, 2),
    ("a step", signal.SIGUSR1, False, 2),
    ("start-up", signal.SIGUSR1, False, 2),
    ("an evaluation", signal.SIGTERM, False, 1),
    ("a save", signal.SIGTERM, False, 1),
    ("an asynchronous save", signal.SIGTERM, True, 1),
]
FULL = [
    ("a step", signal.SIGINT, False, 2),
    ("a step", signal.SIGTERM, True, 1),
] + [
    (moment, number, everyone, 2)
    for moment in MOMENTS
    for number in (signal.SIGTERM, signal.SIGUSR1)
    for everyone in (False, True)
]


@pytest.mark.parametrize(
    ("moment", "number", "everyone", "processes", "short"),
    [(*case, True) for case in CASES] + [(*case, False) for case in FULL if case not in CASES],
)
def test_asked_once_all_stop_saved(
    moment: str,
    number: int,
    everyone: bool,
    processes: int,
    short: bool,
    full: bool,
    tally: Callable[[int, str], AbstractContextManager[Tally]],
    tmp_path: Path,
) -> None:
    if not short and not full:
        pytest.skip("in the full version only")
    asked = "every process" if everyone else "one rank"
    with tally(10, f"{asked} asked to stop during {moment}: saved, code as documented") as t:
        problem = wrong(tmp_path, moment, number, everyone, processes)
        t.check(not problem, problem)


def test_a_second_signal_ends_at_once_even_in_a_collective(tmp_path: Path) -> None:
    workers = launch(tmp_path, processes=2)
    wait_until(lambda: steps(tmp_path), workers)
    workers[1].send_signal(signal.SIGSTOP)  # rank 0 now waits for it, in C++
    workers[0].send_signal(signal.SIGTERM)
    workers[0].send_signal(signal.SIGTERM)  # the same request
    time.sleep(1.0)
    assert workers[0].poll() is None
    # The next one ends it, once it comes 2 seconds after the first was seen.
    deadline = time.monotonic() + PATIENCE
    while workers[0].poll() is None and time.monotonic() < deadline:
        workers[0].send_signal(signal.SIGTERM)
        time.sleep(0.5)
    codes, said = end(workers, 0)
    assert codes[0] == 128 + signal.SIGTERM, said


def test_the_time_limit_saves_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    limited = (*SAVING, "train.exit_after_minutes=0.1")
    codes, said = end(launch(tmp_path, *limited, processes=2))
    assert codes == [RESUME_EXIT_CODE] * 2, said
    assert "stopped by train.exit_after_minutes after step" in said
    assert_saved(tmp_path)
    first = steps(tmp_path)[-1]
    codes, said = end(launch(tmp_path, *limited, processes=2))
    assert codes == [RESUME_EXIT_CODE] * 2, said
    assert_saved(tmp_path)
    assert steps(tmp_path)[-1] > first


def test_what_the_ranks_agree_on() -> None:
    assert exit_code(torch.tensor([0.0, 0.0])) is None
    assert exit_code(torch.tensor([0.0, 2.0])) == RESUME_EXIT_CODE
    assert exit_code(torch.tensor([1.0, 3.0])) == INTERRUPTED_EXIT_CODE


def test_a_request_is_remembered_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.read(CPU).tolist() == [0, 0]
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGUSR1"
        assert stop.read(CPU).tolist() == [0, 1]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_forked_child_has_its_signals_to_itself() -> None:
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(2.5)
        # Were the child's the first request, this one would end the test.
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.2)
        assert stop.reason == "SIGUSR1"


def test_the_time_limit_counts_from_the_start_of_the_run() -> None:
    stop = StopRequest(exit_after_minutes=1.0, started=time.monotonic() - 61)
    assert stop.reason == "train.exit_after_minutes"
    assert stop.read(CPU).tolist() == [0, 1]
    assert StopRequest(exit_after_minutes=1.0).reason is None
    assert StopRequest(started=time.monotonic() - 1e6).reason is None
