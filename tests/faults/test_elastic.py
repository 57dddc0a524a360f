"""Row 14: samples under kills and changes of the data-parallel size: none twice, none missing."""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from faults_helpers import (
    PATIENCE,
    SMALL,
    end,
    metrics_file,
    saved_steps,
    send,
    start,
    steps,
    wait_for_step,
)
from faults_table import Tally

from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.warm_start import WarmProcess

SCRIPT = Path(__file__).with_name("recorded_run.py")
GLOBAL_BATCH = 12
RUN = (
    *SMALL,
    f"train.global_batch_size={GLOBAL_BATCH}",
    "train.micro_batch_size=1",
    "checkpoint.resume=auto",
    "checkpoint.interval=5",
)


def launch_recorded(
    run: Path, samples: Path, last: int, processes: int, workers: int
) -> list[WarmProcess]:
    overrides = [*RUN, f"train.steps={last}", f"data.num_workers={workers}", f"run.dir={run}"]
    job = {"overrides": overrides, "port": free_ports(1)[0], "samples": str(samples)}
    jobs = samples.with_suffix(".json")
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    return start([str(SCRIPT), str(jobs)], processes=processes)


def handed_out(samples: Path) -> dict[int, list[int]]:
    """Step -> the numbers that all ranks of one start got for it, sorted.

    A killed rank may have got a part of its last step only.
    """
    found: dict[int, list[int]] = {}
    for path in sorted(samples.glob("rank-*")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                step, numbers = json.loads(line)
                found.setdefault(step, []).extend(numbers)
    return {step: sorted(numbers) for step, numbers in found.items()}


def test_no_sample_twice_and_none_missing(
    full: bool, tally: Callable[[int, str], AbstractContextManager[Tally]], tmp_path: Path
) -> None:
    last, kills, sizes = (834, 20, (1, 2, 4, 3)) if full else (20, 2, (1, 2))
    choose = random.Random(14)
    run, folder = tmp_path / "run", tmp_path / "samples"
    folder.mkdir()
    points = sorted(choose.sample(range(2, last - 2), kills))
    taken: dict[int, list[int]] = {}
    redone = 0
    for number, processes in zip(range(kills + 1), itertools.cycle(sizes)):
        samples = folder / f"start-{number}"
        found = max(saved_steps(run), default=0)
        before = metrics_file(run)
        # Loader processes fetch ahead of the step.
        workers = launch_recorded(run, samples, last, processes, workers=number % 2)
        if number < kills:
            wait_for_step(run, workers, points[number], before)
            send(workers[choose.randrange(processes)], signal.SIGKILL)
            end(workers, 0)
        else:
            codes, said = end(workers, 4 * PATIENCE)
            assert codes == [0] * processes, said
        got = handed_out(samples)
        assert min(got) == found + 1
        redone += len(got.keys() & taken.keys())
        # A later start takes the place of what was lost of an earlier one.
        taken = {step: taken[step] for step in taken if step <= found} | got
    assert steps(run) == list(range(1, last + 1))
    expected = uninterrupted(tmp_path, last) if full else rule(last)
    with tally(14, "steps whose samples are those of the run without a kill") as t:
        for step, numbers in expected.items():
            t.check(taken.get(step) == numbers, f"step {step}: {taken.get(step)}, not {numbers}")
        t.note = (
            f"{kills} kills, DP {' -> '.join(map(str, sizes))} and round again, "
            f"{redone} steps done twice"
        )
    counted = sorted(itertools.chain.from_iterable(taken.values()))
    with tally(14, "samples, each exactly once") as t:
        for sample in range(last * GLOBAL_BATCH):
            t.check(counted[sample : sample + 1] == [sample], f"sample {sample}")
    assert len(counted) == last * GLOBAL_BATCH


def rule(last: int) -> dict[int, list[int]]:
    """What ``mone_megatron.data.loader`` promises."""
    every = range(last * GLOBAL_BATCH)
    return {
        step + 1: list(every[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH])
        for step in range(last)
    }


def uninterrupted(folder: Path, last: int) -> dict[int, list[int]]:
    """One process from the first to the last step."""
    workers = launch_recorded(folder / "whole", folder / "whole-samples", last, 1, workers=0)
    codes, said = end(workers, 4 * PATIENCE)
    assert codes == [0], said
    got = handed_out(folder / "whole-samples")
    assert got == rule(last)
    return got
