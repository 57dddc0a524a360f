"""Training runs as real processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mone_megatron.testing.launch import REPOSITORY, rank_variables
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.warm_start import WarmProcess

PRETRAIN = ("-m", "mone_megatron.pretrain")
QUIET = (
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "device.threads=1",
)
# tiny_mone made smaller still, for runs of many steps; TP, PP, EP and ETP of 2 and EP of 4 fit.
SMALL = (
    "experiment=tiny_mone",
    "device=cpu",
    *QUIET,
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.dense_ffn_hidden_size=32",
    "model.num_experts=4",
    "model.expert_ffn_hidden_size=32",
    "train.seq_length=16",
)
# A machine under load may be 20 times slower than an idle one.
PATIENCE = 300.0

Workers = Sequence[WarmProcess]


def launch(
    folder: Path, *overrides: str, processes: int = 1, command: Sequence[str] = PRETRAIN
) -> list[WarmProcess]:
    """A run in ``folder``: one process group for each rank, its own children in it."""
    return start([*command, *overrides, f"run.dir={folder}"], processes=processes)


def start(arguments: Sequence[str], *, processes: int = 1) -> list[WarmProcess]:
    """What ``python`` is given, on every rank as by torchrun."""
    port = {"MASTER_PORT": str(free_ports(1)[0])}
    said = Path(tempfile.mkdtemp(prefix="said-"))
    workers = [
        WarmProcess(
            arguments,
            environment=os.environ | rank_variables(rank, processes) | port,
            folder=REPOSITORY,
            stderr=said / str(rank),
            new_session=True,
        )
        for rank in range(processes)
    ]
    weakref.finalize(workers[-1], shutil.rmtree, said, ignore_errors=True)
    return workers


def send(worker: WarmProcess, number: int) -> None:
    """A signal to a rank and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, number)


def end(workers: Workers, seconds: float = PATIENCE) -> tuple[list[int], str]:
    """Wait; exit codes and all that was said. Whoever is there after ``seconds`` is killed."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(0.02)
    finally:
        for worker in workers:
            send(worker, signal.SIGKILL)
            # One that does not lead its group yet.
            worker.kill()
    codes = [worker.wait() for worker in workers]
    return codes, "\n".join(worker.said() for worker in workers)


def wait_until(happened: Callable[[], Any], workers: Workers, seconds: float = PATIENCE) -> None:
    """Fails when a worker ends before; after any failure all of them are killed."""
    deadline = time.monotonic() + seconds
    try:
        while not happened():
            ended = [worker.returncode for worker in workers if worker.poll() is not None]
            assert not ended, f"ended with {ended}"
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.001)
    except BaseException as error:
        raise AssertionError(f"{error}\n{end(workers, 0)[1]}") from error


def records(folder: Path) -> list[dict[str, float]]:
    """Of ``metrics.jsonl``; the line being written now is left out."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(folder: Path) -> list[int]:
    """The steps recorded."""
    return [int(record["step"]) for record in records(folder)]


def losses(folder: Path) -> dict[int, str]:
    """Step -> its loss, to the last bit."""
    return {int(record["step"]): float(record["loss"]).hex() for record in records(folder)}


def metrics_file(run: Path) -> int | None:
    """Which file ``metrics.jsonl`` is: each start of a run makes its own."""
    path = run / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def wait_for_step(run: Path, workers: Workers, step: int, before: int | None) -> None:
    """Until this start recorded ``step``.

    Args:
        run: its folder.
        workers: its ranks.
        step: this one or a later one, if the start goes on from it.
        before: :func:`metrics_file` before the start, whose records are the last start's.
    """
    first = max(saved_steps(run), default=0) + 1

    def recorded() -> bool:
        done = steps(run) if metrics_file(run) not in (None, before) else []
        return bool(done) and done[-1] >= max(step, first)

    wait_until(recorded, workers)


def step_folder(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Of whole checkpoints, by their names."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*"))


def state_digest(checkpoint: Path) -> str:
    """SHA-256 over all weights, masters and moments, by name."""
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(checkpoint))
    digest = hashlib.sha256()
    kinds = set()
    for key in sorted(loaded):
        value = loaded[key]
        if isinstance(value, torch.Tensor):
            kinds.add(key.split(".")[1] if key.startswith("optimizer.") else "weight")
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    assert kinds >= {"weight", "exp_avg", "exp_avg_sq"}, kinds
    return digest.hexdigest()
