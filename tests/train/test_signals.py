"""Requests to stop: real signals to real processes, and the time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mone_megatron.testing.launch import REPOSITORY, free_ports
from mone_megatron.train.signals import (
    INTERRUPTED_EXIT_CODE,
    RESUME_EXIT_CODE,
    StopRequest,
    exit_code,
)

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
ENDLESS = ("experiment=tiny_mone", "device=cpu", *QUIET, "train.steps=50000")
COMMAND = (sys.executable, "-m", "mone_megatron.pretrain")
SAVING = ("checkpoint.interval=50000", "checkpoint.resume=auto")
CPU = torch.device("cpu")


def launch(folder: Path, *overrides: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_ports(1)[0]
    return [
        subprocess.Popen(
            [*COMMAND, *ENDLESS, f"run.dir={folder}", *overrides],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def end(workers: Sequence[subprocess.Popen[str]], seconds: float = 60) -> tuple[list[int], str]:
    """Exit codes and all that was said."""
    try:
        errors = [worker.communicate(timeout=seconds)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [worker.returncode for worker in workers], "\n".join(errors)


def wait_until(happened: object, workers: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 90
    while not happened():  # type: ignore[operator]
        for worker in workers:
            assert worker.poll() is None, worker.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def assert_saved(folder: Path) -> None:
    """At the last step, with the records up to it, and marked as interrupted."""
    done = steps(folder)
    assert done == list(range(1, len(done) + 1))
    newest = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))[-1]
    assert newest == f"step_{done[-1]:08d}"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert not list((folder / "checkpoints").glob(".*partial*"))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, INTERRUPTED_EXIT_CODE),
        (signal.SIGTERM, INTERRUPTED_EXIT_CODE),
        (signal.SIGUSR1, RESUME_EXIT_CODE),
    ],
)
def test_one_rank_is_asked_and_all_stop(tmp_path: Path, number: int, code: int) -> None:
    workers = launch(tmp_path, *SAVING, "data.num_workers=1", processes=2)
    wait_until(lambda: steps(tmp_path), workers)
    workers[1].send_signal(number)
    codes, said = end(workers)
    assert codes == [code, code], said
    assert_saved(tmp_path)


def test_every_process_is_asked_loaders_too(tmp_path: Path) -> None:
    workers = launch(tmp_path, *SAVING, "data.num_workers=1")
    wait_until(lambda: steps(tmp_path), workers)
    children = Path(f"/proc/{workers[0].pid}/task/{workers[0].pid}/children").read_text().split()
    assert children
    for process in (*map(int, children), workers[0].pid):
        os.kill(process, signal.SIGTERM)
    codes, said = end(workers)
    assert codes == [INTERRUPTED_EXIT_CODE], said
    assert_saved(tmp_path)


def test_during_start_up(tmp_path: Path) -> None:
    """From when the signal is handled, before there is a model, to the first step."""
    workers = launch(tmp_path, *SAVING, processes=2)

    def handled() -> bool:
        status = Path(f"/proc/{workers[0].pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)

    wait_until(handled, workers)
    assert not steps(tmp_path)
    workers[0].send_signal(signal.SIGUSR1)
    codes, said = end(workers)
    assert codes == [RESUME_EXIT_CODE] * 2, said
    assert steps(tmp_path) == [1]
    assert_saved(tmp_path)


def test_during_an_evaluation(tmp_path: Path) -> None:
    evaluating = ("train.eval_interval=2", "train.eval_steps=60")
    workers = launch(tmp_path, *SAVING, *evaluating)
    wait_until(lambda: len(steps(tmp_path)) == 1, workers)
    time.sleep(0.3)  # a step takes a tenth of that, the evaluation many times as long
    assert len(steps(tmp_path)) == 1
    workers[0].send_signal(signal.SIGTERM)
    codes, said = end(workers)
    assert codes == [INTERRUPTED_EXIT_CODE], said
    assert steps(tmp_path) in ([1, 2], [1, 2, 3])
    assert_saved(tmp_path)


def test_during_a_save(tmp_path: Path) -> None:
    workers = launch(tmp_path, "checkpoint.interval=1", "checkpoint.resume=auto")
    checkpoints = tmp_path / "checkpoints"
    wait_until(lambda: checkpoints.exists() and any(checkpoints.iterdir()), workers)
    workers[0].send_signal(signal.SIGTERM)
    codes, said = end(workers)
    assert codes == [INTERRUPTED_EXIT_CODE], said
    assert len(steps(tmp_path)) <= 3
    assert_saved(tmp_path)


def test_a_second_signal_ends_at_once_even_in_a_collective(tmp_path: Path) -> None:
    workers = launch(tmp_path, processes=2)
    wait_until(lambda: steps(tmp_path), workers)
    workers[1].send_signal(signal.SIGSTOP)  # rank 0 now waits for it, in C++
    time.sleep(0.5)
    workers[0].send_signal(signal.SIGTERM)
    time.sleep(1.0)
    workers[0].send_signal(signal.SIGTERM)  # the same request
    time.sleep(0.5)
    assert workers[0].poll() is None
    time.sleep(1.0)
    sent = time.monotonic()
    workers[0].send_signal(signal.SIGTERM)
    code = workers[0].wait(timeout=10)
    assert time.monotonic() - sent < 2
    workers[1].kill()
    end(workers)
    assert code == 128 + signal.SIGTERM


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
