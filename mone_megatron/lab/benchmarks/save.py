"""Measures how long a checkpoint stops training: written beside it, and waited for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from mone_megatron.config.schema import Config
from mone_megatron.lab.benchmarks.experiments import OpenExperiment, open_experiments, step_action
from mone_megatron.lab.benchmarks.measure import Spread
from mone_megatron.parallel.groups import close_groups
from mone_megatron.train.resume.checkpointer import Checkpointer, Position
from mone_megatron.train.resume.identity import run_identity


@dataclass(frozen=True)
class SaveCost:
    """Holds what a save costs, as measured on one rank."""

    hardware: str
    megabytes: float
    # Seconds that training stands still for one save.
    sync_seconds: Spread
    async_seconds: Spread
    # Of those: until the state is handed over, and to make it a checkpoint in the end.
    async_start_seconds: Spread
    async_finish_seconds: Spread
    # async over sync, taken one after the other.
    blocking_ratio: Spread
    # Steps during which an async save was being written, over a step without one.
    step_ratio: Spread
    # Seconds from the start of an async save to its end.
    async_written_seconds: Spread


def measure_save(config: Config, *, repeats: int) -> SaveCost:
    """Saves the same training state both ways, in turn.

    Collective over the default process group.

    Args:
        config: from :func:`mone_megatron.lab.benchmarks.ranks.prepare`.
        repeats: saves of each kind.
    """
    (session,) = open_experiments([config], steps_in_memory=2)
    step = step_action(session)
    next(step)
    with _folder() as folder:
        waiting = _checkpointer(session, folder / "sync", async_save=False)
        beside = _checkpointer(session, folder / "async", async_save=True)
        rows = []
        for number in range(repeats + 1):
            position = Position(step=number + 1, tokens=0)
            started = time.perf_counter()
            next(step)
            plain_step = time.perf_counter() - started
            waiting.save(position)
            sync = waiting.take_blocked_seconds()
            began = time.perf_counter()
            beside.save(position)
            start = beside.take_blocked_seconds()
            steps = []
            while beside.is_saving:
                started = time.perf_counter()
                writing = beside.read(session.device.torch_device)
                next(step)
                dist.all_reduce(writing)
                steps.append(time.perf_counter() - started)
                beside.advance(writing)
            finish = beside.take_blocked_seconds()
            written = time.perf_counter() - began
            rows.append((sync, start, finish, sum(steps) / len(steps) / plain_step, written))
        size = waiting.store.checkpoints()[-1].size / 1e6
    close_groups()
    # The first save plans, and checks that every element is saved once.
    syncs, starts, finishes, slowdowns, writtens = zip(*rows[1:], strict=True)
    both = [start + finish for start, finish in zip(starts, finishes, strict=True)]
    return SaveCost(
        hardware=session.device.hardware,
        megabytes=size,
        sync_seconds=Spread.of(syncs),
        async_seconds=Spread.of(both),
        async_start_seconds=Spread.of(starts),
        async_finish_seconds=Spread.of(finishes),
        blocking_ratio=Spread.of([a / s for a, s in zip(both, syncs, strict=True)]),
        step_ratio=Spread.of(slowdowns),
        async_written_seconds=Spread.of(writtens),
    )


def _checkpointer(session: OpenExperiment, folder: Path, *, async_save: bool) -> Checkpointer:
    config = session.config
    config = replace(
        config,
        run=replace(config.run, dir=str(folder)),
        checkpoint=replace(config.checkpoint, async_save=async_save),
    )
    identity = run_identity(
        config,
        data_fingerprint=session.data.fingerprint,
        vocab_size=session.data.vocab_size,
        dtype=session.device.dtype,
    )
    return Checkpointer(
        config,
        identity=identity,
        state=session.state,
        tokenizer_dir=Path(session.data.tokenizer_dir),
        say=lambda message: None,
    )


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields one temporary folder for all ranks."""
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box, src=0)
        yield Path(box[0])
        dist.barrier()
