"""Row 1: a run that is killed again and again is the run that was not, to the last bit."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from faults_helpers import (
    PATIENCE,
    SMALL,
    Workers,
    end,
    launch,
    losses,
    metrics_file,
    saved_steps,
    send,
    state_digest,
    step_folder,
    steps,
    wait_for_step,
    wait_until,
)
from faults_table import Tally

from mone_megatron.config.schema import CheckpointConfig

INTERVAL = 5
# Dropout, so that the random streams count.
RUN = (*SMALL, "model.hidden_dropout=0.1", f"checkpoint.interval={INTERVAL}")
KEEP_ALL = "checkpoint.keep_last=1000"
HAS_ASYNC = "async_save" in {one.name for one in fields(CheckpointConfig)}


@dataclass
class Reference:
    """The run that nobody killed."""

    losses: dict[int, str]
    digests: dict[int, str]


@dataclass
class Attempt:
    """One start of the run, and what was wrong with it."""

    asynchronous: bool
    resumed_at: int
    # Whole checkpoints from before.
    found: set[int]
    problems: list[str] = field(default_factory=list)


def partial_saves(run: Path, least: int) -> list[Path]:
    """Hidden folders of saves of step ``least`` or later."""
    folders = (run / "checkpoints").glob(".step_*.partial-*")
    return [path for path in folders if int(path.name[6:14]) >= least]


def has_begun(partial: Path, file: str) -> bool:
    """Whether a save holds ``file``, or any file when that is empty."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in partial.iterdir()]
        return file in names if file else bool(names)
    return False


def kill_inside_a_save(
    run: Path, workers: Workers, victim: int, least: int, file: str, left: set[Path]
) -> None:
    """The victim is stopped first: only a save that is still going on then will do.

    Args:
        run: its folder.
        workers: its ranks.
        victim: the rank.
        least: the save of this step or of a later one.
        file: when it holds this file; at once when empty.
        left: partial saves of earlier starts.
    """
    worker = workers[victim]
    while True:
        begun: list[Path] = []

        def going_on(least: int = least, file: str = file, begun: list[Path] = begun) -> bool:
            found = [path for path in partial_saves(run, least) if path not in left]
            begun[:] = [path for path in found if has_begun(path, file)]
            return bool(begun)

        wait_until(going_on, workers)
        send(worker, signal.SIGSTOP)
        # A stop takes effect some time after it is sent, and the other ranks do their part.
        time.sleep(0.05)
        if any(has_begun(path, "") for path in begun):
            send(worker, signal.SIGKILL)
            worker.wait()
            return
        send(worker, signal.SIGCONT)
        # Too late for that one; any moment of a later one.
        least, file = max(int(path.name[6:14]) for path in begun) + 1, ""


def end_of_the_others(workers: Workers, victim: int) -> tuple[bool, str]:
    """Whether they ended by themselves soon, and all that was said."""
    others = [worker for rank, worker in enumerate(workers) if rank != victim]
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and any(worker.poll() is None for worker in others):
        time.sleep(0.02)
    by_themselves = all(worker.poll() is not None for worker in others)
    # What torchrun does at once.
    return by_themselves, end(workers, 0)[1]


def verify(run: Path, attempt: Attempt, said: str, reference: Reference) -> None:
    """What this start did is what the reference did."""
    if attempt.resumed_at and f"after step {attempt.resumed_at}" not in said:
        attempt.problems.append(f"it did not resume after step {attempt.resumed_at}: {said}")
    for step, loss in losses(run).items():
        if loss != reference.losses[step]:
            attempt.problems.append(f"step {step}: loss {loss}, not {reference.losses[step]}")
            break
    for step in sorted(set(saved_steps(run)) - attempt.found):
        if state_digest(step_folder(run, step)) != reference.digests[step]:
            attempt.problems.append(f"step {step}: weights or moments differ")
            break


def run_to_the_end(folder: Path, common: tuple[str, ...], processes: int) -> Reference:
    codes, said = end(launch(folder, *common, processes=processes), 4 * PATIENCE)
    assert codes == [0] * processes, said
    digests = {step: state_digest(step_folder(folder, step)) for step in saved_steps(folder)}
    return Reference(losses(folder), digests)


# Processes, layout, steps, kills (all, inside a save) in the full and in the short version.
CHAINS: dict[str, tuple[int, tuple[str, ...], tuple[int, int, int], tuple[int, int, int]]] = {
    "one process": (1, (), (200, 20, 10), (30, 3, 1)),
    "two processes": (2, ("parallel.expert=2",), (200, 10, 5), (0, 0, 0)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_killed_again_and_again(
    name: str,
    full: bool,
    tally: Callable[[int, str], AbstractContextManager[Tally]],
    tmp_path: Path,
) -> None:
    processes, layout, long, short = CHAINS[name]
    last, kills, inside = long if full else short
    if not kills:
        pytest.skip("in the full version only")
    choose = random.Random(f"kills of {name}")
    common = (*RUN, *layout, f"train.steps={last}", KEEP_ALL)
    reference = run_to_the_end(tmp_path / "reference", common, processes)
    run = tmp_path / "run"
    in_saves = set(choose.sample(range(kills), inside))
    points = sorted(choose.sample(range(2, last - 2 * INTERVAL), kills))
    done: list[tuple[str, Attempt]] = []
    alone = 0
    for number in range(kills + 1):
        found = set(saved_steps(run))
        attempt = Attempt(HAS_ASYNC and number % 2 == 1, max(found, default=0), found)
        options = ["checkpoint.resume=auto"]
        options += ["checkpoint.async_save=true"] if attempt.asynchronous else []
        before, left = metrics_file(run), set(partial_saves(run, 0))
        workers = launch(run, *common, *options, processes=processes)
        if number == kills:
            codes, said = end(workers, 4 * PATIENCE)
            assert codes == [0] * processes, said
            verify(run, attempt, said, reference)
            done.append(("", attempt))
            break
        victim = choose.randrange(processes)
        point, file = points[number], choose.choice(["", "", ".metadata", "manifest.json"])
        if number in in_saves:
            kill_inside_a_save(run, workers, victim, point, file, left)
        else:
            wait_for_step(run, workers, point, before)
            time.sleep(choose.uniform(0, 0.03))
            send(workers[victim], signal.SIGKILL)
        by_themselves, said = end_of_the_others(workers, victim)
        alone += by_themselves
        verify(run, attempt, said, reference)
        kind = "an asynchronous save" if attempt.asynchronous else "a save"
        # Of two ranks, the one that is left removes the partial save when it sees its peer gone.
        inside_one = number in in_saves or set(partial_saves(run, 0)) - left
        where = f"inside {kind}" if inside_one else "between saves"
        done.append((where, attempt))
    assert sorted(losses(run)) == steps(run) == list(range(1, last + 1))
    same_end = state_digest(step_folder(run, last)) == reference.digests[last]
    for where in sorted({where for where, _ in done[:-1]}):
        with tally(1, f"SIGKILL {where}, {name}, then resumed") as t:
            for number, (kind, _) in enumerate(done[:-1]):
                if kind == where:
                    # The start after the kill, up to the next one; and the end of all.
                    problems = done[number + 1][1].problems
                    t.check(same_end and not problems, f"kill {number + 1}: {problems}")
            if processes > 1:
                t.note = f"of {kills} kills in all, the other rank ended by itself in {alone}"
