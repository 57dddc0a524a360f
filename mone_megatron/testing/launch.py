"""Launches real training processes from a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.warm_start import WarmProcess, Worker, imports_as_usual

REPOSITORY = Path(__file__).resolve().parents[2]


def import_path(*folders: Path) -> str:
    """Returns the ``PYTHONPATH`` that has folders before those of this process.

    A test that named its folders alone would let the processes it starts import another release of
    megatron-core than it does itself.
    """
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([*map(str, folders), *filter(None, [inherited])])


def start_in_session(command: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a command from the repository in a session of its own.

    ``os.killpg`` of its number sends a signal to all its processes, as a terminal does.
    """
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_all(workers: Sequence[Worker], timeout: float) -> list[int | None]:
    """Returns the exit codes of all workers, or None for those still running when one failed or
    time ran out.

    A failed rank leaves the others waiting in a collective; they are killed at once.
    """
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [worker.poll() for worker in workers]
            if all(code is not None for code in codes) or any(codes):
                return codes
            time.sleep(0.05)
        return [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def rank_variables(rank: int, processes: int) -> dict[str, str]:
    """Returns torchrun's variables for a rank on this machine, but the port."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def run_layouts(
    jobs: Mapping[str, Sequence[str]],
    *,
    processes: int,
    folder: Path,
    timeout: float = 600,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Trains each job's configuration on ``processes`` ranks of one thread, into ``folder/NAME``.

    Args:
        jobs: name -> Hydra overrides.
        processes: ranks.
        folder: where the runs go.
        timeout: seconds for all of them together.
        variables: environment variables of the ranks, beside those of this process; with any, the
            ranks import everything anew.

    Raises:
        RuntimeError: with the output of the rank that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file = folder / f"jobs-{processes}.json"
    listed = [
        # One thread: two wait for each other where two processes of pytest have a core each.
        {"overrides": ["device.threads=1", *overrides, f"run.dir={folder / name}"], "port": port}
        for (name, overrides), port in zip(jobs.items(), free_ports(len(jobs)), strict=True)
    ]
    job_file.write_text(json.dumps(listed), encoding="utf-8")
    workers: list[Worker] = []
    for rank in range(processes):
        environment = os.environ | dict(variables or {}) | rank_variables(rank, processes)
        log = folder / f"rank-{processes}-{rank}.log"
        arguments = ["-m", "mone_megatron.testing.many_runs", str(job_file)]
        if variables or not imports_as_usual(environment):
            # What they change may be what is imported.
            with log.open("w", encoding="utf-8") as said:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=REPOSITORY,
                        env=environment,
                        stdout=said,
                        stderr=said,
                    )
                )
            continue
        workers.append(
            WarmProcess(
                arguments, environment=environment, folder=REPOSITORY, stdout=log, stderr=log
            )
        )
    codes = wait_for_all(workers, timeout)
    failed = [rank for rank, code in enumerate(codes) if code] or [
        rank for rank, code in enumerate(codes) if code is None
    ]
    for rank in failed:
        output = (folder / f"rank-{processes}-{rank}.log").read_text(encoding="utf-8")
        why = f"ended with {codes[rank]}" if codes[rank] else f"did not end within {timeout} s"
        raise RuntimeError(f"rank {rank} of {processes} {why}:\n{output[-6000:]}")
