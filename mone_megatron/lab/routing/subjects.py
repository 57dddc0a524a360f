"""Finds what is to be analysed and measures its traces, one after the other, against the last."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mone_megatron.checkpoint import CheckpointStore, read_checkpoint
from mone_megatron.lab.routing.megatron import converted, is_megatron_trace
from mone_megatron.lab.routing.statistics import Limits, TraceStatistics, measure
from mone_megatron.lab.routing.trace import HEADER_FILE, Trace, TraceHeader


@dataclass(frozen=True)
class Subject:
    """Describes one checkpoint to analyse, or a trace of one.

    Attributes:
        where: its folder (or a model's name on the Hub).
        label: its name in the results.
        kind: what is there: one of ours by ``trace``, Megatron-LM's by ``megatron``.
    """

    where: str
    label: str
    kind: Literal["model", "trace", "megatron"]


# Gives the trace of a model in a folder.
Traced = Callable[[Subject, Path], Trace]


def subjects(models: Sequence[str]) -> list[Subject]:
    """Returns what is to be analysed, the reference of saturation last.

    Raises:
        ValueError: a run without checkpoints, a damaged trace, or one thing named twice.
    """
    found: list[Subject] = []
    for where in models:
        folder = Path(where)
        if (folder / HEADER_FILE).is_file() or any(folder.glob("shard-*.npz")):
            found.append(Subject(where, Trace(folder).header.name, "trace"))
        elif is_megatron_trace(folder):
            found.append(Subject(where, folder.resolve().name, "megatron"))
        elif (folder / "manifest.json").is_file():
            step = read_checkpoint(folder).step
            run = folder.resolve().parent.parent.name
            found.append(Subject(where, f"{run} step {step}", "model"))
        elif (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file():
            found += _run_checkpoints(folder)
        else:
            found.append(Subject(where, folder.resolve().name, "model"))
    if len({Path(subject.where).resolve() for subject in found}) < len(found):
        raise ValueError("MODEL: one model is named twice; name it once")
    if len({subject.label for subject in found}) < len(found):
        # Whole paths tell them apart.
        found = [Subject(one.where, one.where, one.kind) for one in found]
    return found


def _run_checkpoints(run: Path) -> list[Subject]:
    store = CheckpointStore(run / "checkpoints", log=lambda message: None)
    by_step = {checkpoint.step: checkpoint.path for checkpoint in store.checkpoints()}
    if not by_step:
        raise ValueError(
            f"{run}: this run has no checkpoint; save some with checkpoint.interval, or give a "
            "model"
        )
    return [
        Subject(str(path), f"{run.resolve().name} step {step}", "model")
        for step, path in sorted(by_step.items())
    ]


def analyze(
    chosen: Sequence[Subject],
    record: Traced | None,
    limits: Limits,
    *,
    keep: Path | None,
    num_experts: int | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[TraceHeader, list[TraceStatistics]]:
    """Measures every subject, against the last.

    Args:
        chosen: from :func:`subjects`.
        record: gives the trace of a model; needed when there is one.
        limits: of the statistics.
        keep: a folder for those traces; None for a temporary one, from which each goes when it is
            measured.
        num_experts: of a layer in Megatron-LM's traces; None for what they name.
        say: is told what is taken for granted.

    Returns:
        What the last trace is of, and the statistics in the order of ``chosen``.

    Raises:
        ValueError: what cannot be analysed: one line.
    """

    def trace_of(subject: Subject, folder: Path) -> Trace:
        where = Path(subject.where)
        if subject.kind == "trace":
            return Trace(where)
        if subject.kind == "megatron":
            return converted(where, folder, experts=num_experts, say=say)
        assert record is not None
        return record(subject, folder)

    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="routing-")))
        else:
            folder = keep
        folders = [folder / name for name in _folder_names(chosen)]
        # First, so that the others can be held against it.
        final = trace_of(chosen[-1], folders[-1])
        results = []
        for subject, place in zip(chosen[:-1], folders[:-1], strict=True):
            trace = trace_of(subject, place)
            results.append(_measured(subject.label, trace, final, limits))
            if keep is None and trace.folder == place:
                for file in place.iterdir():
                    file.unlink()
        results.append(_measured(chosen[-1].label, final, None, limits))
        return final.header, results


def _folder_names(chosen: Sequence[Subject]) -> list[str]:
    names = [re.sub(r"[^\w.-]+", "_", subject.label).strip("_") for subject in chosen]
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
    return names


def _measured(label: str, trace: Trace, final: Trace | None, limits: Limits) -> TraceStatistics:
    with tqdm(total=len(trace.header.layers), desc=f"measuring {label}", unit="layer") as bar:
        measured = measure(trace, final, limits, progress=bar.update)
    return replace(measured, name=label)
