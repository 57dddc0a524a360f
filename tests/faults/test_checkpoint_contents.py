"""Rows 7, 8 and 9: what a checkpoint must hold, and saves that are written beside training."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults_helpers import PATIENCE
from faults_table import Tally
from megatron.core import dist_checkpointing

from mone_megatron.checkpoint import CheckpointWriteError, open_checkpoint
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches
from mone_megatron.train.resume.checkpointer import Checkpointer, Position
from mone_megatron.train.step import Stepper

TINY = (
    "experiment=tiny_mone",
    "device=cpu",
    "model.num_layers=2",
    "model.router.score_function=sigmoid",
    "model.router.expert_bias=true",
    "checkpoint.keep_last=9",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "ep2": (2, ("parallel.expert=2",)),
    "tp2_without_distributed_optimizer": (
        2,
        ("parallel.tensor=2", "parallel.distributed_optimizer=false"),
    ),
    "pp2": (2, ("parallel.pipeline=2",)),
}
MakeTally = Callable[[int, str], AbstractContextManager[Tally]]


def _tried(full: bool) -> list[tuple[str, tuple[int, tuple[str, ...]]]]:
    return [(name, layout) for name, layout in LAYOUTS.items() if full or name in ("one", "ep2")]


def _trained(folder: str, layout: tuple[str, ...]) -> Trainer:
    trainer = build_trainer((*TINY, *layout, f"run.dir={folder}"), data_fingerprint="none")
    trainer.stepper.train(random_batches(trainer))
    return trainer


def _into(trainer: Trainer, folder: str, *, async_save: bool = False) -> Checkpointer:
    """The trainer's checkpointer, saving into another folder."""
    config = trainer.config
    config = replace(
        config,
        run=replace(config.run, dir=folder),
        checkpoint=replace(config.checkpoint, async_save=async_save),
    )
    ours = trainer.checkpointer
    return Checkpointer(
        config, identity=ours.identity, state=trainer.state, tokenizer_dir=None, say=ours.say
    )


def _scribble(trainer: Trainer) -> None:
    """Change everything that a step changes, in place."""
    for chunk in trainer.chunks:
        for tensor in (*chunk.module.parameters(), *chunk.module.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(7.0)
    optimizer = trainer.state.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        for state in part.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(7.0)
    torch.manual_seed(7)


def save_both_ways(folder: str, layout: tuple[str, ...]) -> None:
    """One state saved waiting and not waiting, overwritten as soon as the second returns."""
    trainer = _trained(f"{folder}/sync", layout)
    position = Position(step=1, tokens=512)
    beside = _into(trainer, f"{folder}/async", async_save=True)
    trainer.checkpointer.save(position)
    beside.save(position)
    _scribble(trainer)
    beside.finish()


def _digests(run: Path) -> dict[str, str]:
    files = open_checkpoint(run / "checkpoints" / "step_00000001").manifest.files
    return {name: file.sha256 for name, file in files.items() if name.endswith(".distcp")}


def test_what_changes_after_an_async_save_is_not_in_it(
    tmp_path: Path, two_processes: Processes, tally: MakeTally, full: bool
) -> None:
    with (
        tally(8, "async save, everything overwritten right after it returns") as t,
        Processes(1) as one,
    ):
        for name, (size, layout) in _tried(full):
            processes = one if size == 1 else two_processes
            processes.run(save_both_ways, str(tmp_path / name), layout)
            sync, beside = _digests(tmp_path / name / "sync"), _digests(tmp_path / name / "async")
            assert len(sync) >= size
            t.check(sync == beside, f"{name}: files differ from those of a sync save")


def kill_a_writer(folder: str, layout: tuple[str, ...], rank: int) -> tuple[str, float]:
    """Save, then save beside training with a disk that does not answer, and kill that writer.

    Returns:
        What was raised on this rank, and seconds from the kill.
    """
    trainer = _trained(folder, layout)
    trainer.checkpointer.save(Position(step=1, tokens=512))
    beside = _into(trainer, folder, async_save=True)
    begin = beside.store.begin

    def begin_slowly(step: int) -> Path:
        partial = begin(step)
        # Opening a pipe for writing waits for a reader, as a disk may.
        os.mkfifo(partial / f"__{rank}_0.distcp")
        return partial

    beside.store.begin = begin_slowly  # type: ignore[method-assign, assignment]
    beside.save(Position(step=2, tokens=1024))
    killed = time.monotonic()
    waiting = beside.read(torch.device("cpu"))
    if dist.get_rank() == rank:
        assert waiting.item() == 1.0
        assert beside.writer_pid is not None
        os.kill(beside.writer_pid, signal.SIGKILL)
    # As the training loop does at the end of each step.
    try:
        while True:
            waiting = beside.read(torch.device("cpu"))
            dist.all_reduce(waiting)
            beside.advance(waiting)
            if time.monotonic() - killed > PATIENCE:
                return "nothing", time.monotonic() - killed
            time.sleep(0.05)
    except CheckpointWriteError as error:
        return str(error), time.monotonic() - killed


def test_a_killed_writer_is_reported(
    tmp_path: Path, two_processes: Processes, tally: MakeTally, full: bool
) -> None:
    slowest = 0.0
    with tally(9, "async writer killed") as t:
        for name, (size, layout) in _tried(full):
            for rank in range(size):
                folder = tmp_path / f"{name}-{rank}"
                if size == 1:
                    with Processes(1) as one:
                        told = one.run(kill_a_writer, str(folder), layout, rank)
                else:
                    told = two_processes.run(kill_a_writer, str(folder), layout, rank)
                slowest = max(slowest, *(seconds for _, seconds in told))
                named = all(f"__{rank}_0.distcp" in why and "SIGKILL" in why for why, _ in told)
                store = folder / "checkpoints"
                tracker = json.loads((store / "latest.json").read_text())
                left = {path.name for path in store.iterdir()}
                t.check(
                    named and tracker["step"] == 1 and left == {"step_00000001", "latest.json"},
                    f"{name}, rank {rank}: {told}, {sorted(left)}",
                )
        t.note = f"reported on every rank after at most {slowest:.1f} s"


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The entries of nested state whose sharded name, or own name, is not ``key``."""
    kept = {}
    for name, entry in content.items():
        if isinstance(entry, Mapping) and name != "schedule":
            kept[name] = _without(dict(entry), key)
        elif key not in (name, getattr(entry, "key", None)):
            kept[name] = entry
    return kept


BIAS = "decoder.layers.1.mlp.router.expert_bias"
WEIGHT = "embedding.word_embeddings.weight"
PIECES = (
    BIAS,
    WEIGHT,
    f"optimizer.exp_avg.{WEIGHT}",
    f"optimizer.exp_avg_sq.{WEIGHT}",
    "random",
    "step",
    "tokens",
    "samples",
    "updates",
    "schedule",
)
STREAMS = ("torch", "tracker", "numpy_words", "python_words")


def resume_without(folder: str, layout: tuple[str, ...], pieces: Sequence[str]) -> dict[str, str]:
    """For each piece, save everything but it, sound in every other way, and try to go on from it.

    Returns:
        What was said of each.
    """
    trainer = _trained(folder, layout)
    save, random_entry = dist_checkpointing.save, Checkpointer._random_entry

    def save_without(content: dict[str, Any], *rest: Any, **options: Any) -> Any:
        return save(_without(content, piece), *rest, **options)

    def entry_without(self: Checkpointer, state: dict[str, Any] | None) -> Any:
        if state is not None:
            state.pop(piece, None)
        return random_entry(self, state)

    told = {}
    for piece in pieces:
        checkpointer = _into(trainer, f"{folder}/{piece}")
        dist_checkpointing.save, Checkpointer._random_entry = save_without, entry_without  # type: ignore
        try:
            checkpointer.save(Position(step=1, tokens=512))
        finally:
            dist_checkpointing.save, Checkpointer._random_entry = save, random_entry  # type: ignore
        try:
            checkpointer._resume("auto")
        except ValueError as error:
            told[piece] = str(error)
    return told


@pytest.mark.parametrize("layout", ["one", "ep2"])
def test_a_checkpoint_that_lacks_a_piece_is_refused(
    tmp_path: Path, two_processes: Processes, tally: MakeTally, layout: str
) -> None:
    size, overrides = LAYOUTS[layout]
    pieces = (*PIECES, *STREAMS)
    with tally(7, "a piece of state removed, the manifest in order") as t, Processes(size) as own:
        processes = own if size == 1 else two_processes
        told = processes.run(resume_without, str(tmp_path), overrides, pieces)
        for piece in pieces:
            refused = [piece in one.get(piece, "") for one in told]
            t.check(all(refused), f"{piece}: {[one.get(piece, 'resumed') for one in told]}")


def test_steps_go_on_while_a_save_is_written(tmp_path: Path, two_processes: Processes) -> None:
    """The next save waits for the one before; both are there in the end."""
    two_processes.run(save_twice, str(tmp_path))
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"step_00000001", "step_00000002", "latest.json"}


def save_twice(folder: str) -> None:
    trainer = _trained(folder, ("checkpoint.async_save=true",))
    checkpointer, stepper = trainer.checkpointer, trainer.stepper
    assert isinstance(stepper, Stepper)
    checkpointer.save(Position(step=1, tokens=512))
    assert checkpointer.writer_pid is not None
    stepper.train(random_batches(trainer))
    checkpointer.save(Position(step=2, tokens=1024))
    checkpointer.finish()
    assert checkpointer.writer_pid is None
    assert checkpointer.take_blocked_seconds() > 0
    assert checkpointer.take_blocked_seconds() == 0
