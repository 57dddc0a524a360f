"""Trains what a study still lacks: a process for each variant, one seed after the other in it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mone_megatron.config.load import from_yaml
from mone_megatron.config.schema import Config
from mone_megatron.counting import counted
from mone_megatron.helpers import ending, starting, unwinding_on_sigterm
from mone_megatron.lab.studies.definition import Study, folder_of
from mone_megatron.report.formatting import format_duration

_POLL_SECONDS = 0.5
# Lines of a failed process's output that are shown.
_SHOWN_LINES = 12
# Keys that may differ between runs that count as the same.
_FREE = ("run.", "device.", "logging.")


@dataclass(frozen=True)
class Place:
    """Describes one run of a study."""

    variant: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Returns whether it was trained to its end."""
        try:
            summary = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(summary.get("status") == "completed")


def places(study: Study, output: Path, seeds: Sequence[int]) -> list[Place]:
    """Returns where every run of a study is, or will be."""
    return [
        Place(variant, seed, output / folder_of(variant) / f"seed_{seed}")
        for variant in study.variants
        for seed in seeds
    ]


def check_settings(study: Study, runs: Sequence[Place]) -> None:
    """Refuses runs that are there with other settings than the study's now.

    Raises:
        ValueError: naming the run and the key.
    """
    for run in runs:
        if not (run.folder / "config.yaml").is_file():
            continue
        if difference := _difference(_wanted(study, run), _made_with(run.folder)):
            raise ValueError(
                f"{run.folder}: was made with {difference}; remove it, or give another --output"
            )


def link_same(study: Study, runs: Sequence[Place], pool: Path) -> int:
    """Links finished runs of other studies that have the same settings; returns how many.

    Args:
        study: checked.
        runs: of this study.
        pool: the folder that the studies' folders are in.
    """
    linked = 0
    # Each is compared with many, and is slower to read than to compare.
    made_with = functools.cache(_made_with)
    for run in runs:
        if run.done or run.folder.exists():
            continue
        wanted = _wanted(study, run)
        for other in sorted(pool.glob(f"*/*/seed_{run.seed}")):
            if not Place("", run.seed, other).done:
                continue
            if _difference(wanted, made_with(other.resolve())) is None:
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                run.folder.symlink_to(os.path.relpath(other.resolve(), run.folder.parent))
                linked += 1
                break
    return linked


def _wanted(study: Study, run: Place) -> dict[str, Any]:
    """Returns the values that a run trains with by key, but for those of ``_FREE``."""
    config = study.configs[run.variant]
    return _flat(replace(config, train=replace(config.train, seed=run.seed)))


def _made_with(folder: Path) -> dict[str, Any]:
    """Returns the values that a run was made with by key; those younger than it have defaults."""
    return _flat(from_yaml(folder / "config.yaml"))


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Returns the first key that a run was made with another value of; None if there is none."""
    for key, value in wanted.items():
        if found[key] != value and not key.startswith(_FREE):
            return f"{key}={found[key]}, not {value}"
    return None


def _flat(config: Config) -> dict[str, Any]:
    def walk(values: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{before}{key}.")
            else:
                yield f"{before}{key}", value

    return dict(walk(asdict(config), ""))


def _arguments(study: Study, variant: str, folder: Path | str) -> list[str]:
    return [
        *study.arguments(variant),
        f"run.name='{study.name}: {variant}'",
        f"run.dir='{folder}'",
    ]


def train(
    study: Study,
    output: Path,
    seeds: Sequence[int],
    *,
    jobs: int,
    say: Callable[[str], None],
) -> None:
    """Trains every run that is not done; those that are stay as they are.

    Args:
        study: checked.
        output: the study's folder.
        seeds: of each variant.
        jobs: processes at a time, of one thread each.
        say: is told of progress.

    Raises:
        ValueError: for runs of other settings (see :func:`check_settings`).
        RuntimeError: when a process fails, with the end of its output. The others are stopped, and
            what is done stays.
        HelperError: when a process cannot be started.
    """
    runs = places(study, output, seeds)
    check_settings(study, runs)
    if linked := link_same(study, runs, output.parent):
        say(f"{study.name}: {linked} runs of other studies are the same, and linked")
    todo = {
        variant: missing
        for variant in study.variants
        if (missing := [run for run in runs if run.variant == variant and not run.done])
    }
    total = sum(map(len, todo.values()))
    if not total:
        say(f"{study.name}: all {counted(len(runs), 'run')} are there")
        return
    say(f"{study.name}: {total} of {len(runs)} runs to train, {jobs} at a time")
    started = time.monotonic()
    waiting, running = list(todo), dict[str, subprocess.Popen[bytes]]()
    finished = 0
    with unwinding_on_sigterm(), _ending_all(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                variant = waiting.pop(0)
                running[variant] = _start(study, output, todo[variant])
            time.sleep(_POLL_SECONDS)
            now_finished = sum(run.done for missing in todo.values() for run in missing)
            if now_finished > finished:
                finished = now_finished
                left = (time.monotonic() - started) / finished * (total - finished)
                say(f"{study.name}: {finished}/{total} runs, {format_duration(left)} left")
            for variant, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[variant]
                if code != 0 or not all(run.done for run in todo[variant]):
                    raise RuntimeError(_failure(study, output, variant, code))


@contextmanager
def _ending_all(running: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ends the processes that still run at the end of what is inside."""
    try:
        yield
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _log_of(output: Path, variant: str) -> Path:
    return output / f"{folder_of(variant)}.log"


def _start(study: Study, output: Path, missing: Sequence[Place]) -> subprocess.Popen[bytes]:
    variant = missing[0].variant
    # One process for the seeds of a variant: starting takes as long as a short run.
    folder = missing[0].folder.with_name("seed_${train.seed}")
    command = [
        *(sys.executable, "-m", "mone_megatron.pretrain", "-m"),
        *_arguments(study, variant, folder),
        f"train.seed={','.join(str(run.seed) for run in missing)}",
        *("device.kind=cpu", "device.threads=1"),
    ]
    log = _log_of(output, variant)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, starting(f"the runs of {variant} (--jobs)"):
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def _failure(study: Study, output: Path, variant: str, code: int) -> str:
    log = _log_of(output, variant)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n".join([f"{study.name}: {variant}: {ending(code)}; {log} ends:", *lines])
