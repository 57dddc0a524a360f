"""A loss or gradient that goes wrong on one rank: every rank does the same about it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mone_megatron.testing.launch import REPOSITORY, free_ports
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
RUN = ("experiment=tiny_mone", "device=cpu", *QUIET, "checkpoint.keep_last=20")
SCRIPT = Path(__file__).with_name("faulty_run.py")


@dataclass(frozen=True)
class Job:
    """One run: what is overridden, and which steps go wrong on which rank."""

    overrides: tuple[str, ...]
    faults: Mapping[int, str] = field(default_factory=dict)
    rank: int = 0


@dataclass(frozen=True)
class Ended:
    """How it went: exit codes by rank, and rank 0's stderr."""

    folder: Path
    codes: list[int]
    said: str


def train(folder: Path, jobs: Mapping[str, Job], *, processes: int) -> dict[str, Ended]:
    """Run the jobs one after another in the same processes."""
    listed = [
        {
            "overrides": [*RUN, f"run.dir={folder / name}", *job.overrides],
            "faults": {str(step): kind for step, kind in job.faults.items()},
            "rank": job.rank,
            "port": port,
            "said": str(folder / f"{name}.said"),
        }
        for (name, job), port in zip(jobs.items(), free_ports(len(jobs)), strict=True)
    ]
    job_file = folder / f"jobs-{processes}.json"
    job_file.write_text(json.dumps(listed), encoding="utf-8")
    workers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(job_file)],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), [
        path.read_text() for path in folder.glob("*.said.*")
    ]
    codes = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        name: Ended(
            folder / name,
            [rank_codes[number] for rank_codes in codes],
            (folder / f"{name}.said.0").read_text(encoding="utf-8"),
        )
        for number, name in enumerate(jobs)
    }


def records(folder: Path) -> list[dict[str, float | None]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(checkpoint))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def assert_same_state(left: Path, right: Path) -> None:
    first, second = tensors(left), tensors(right)
    assert first.keys() == second.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in first)
    assert not [key for key in first if not torch.equal(first[key], second[key])]


EIGHT = ("train.steps=8", "checkpoint.interval=4")
SIX_BY_THREE = ("train.steps=6", "checkpoint.interval=3", "train.on_bad_loss=skip")
SKIP: dict[str, tuple[str, ...]] = {
    "distributed_optimizer": (),
    "plain_optimizer": ("parallel.distributed_optimizer=false", "parallel.expert=2"),
    "bf16": ("device.dtype=bf16",),
    "expert_bias": (
        "model.router.score_function=sigmoid",
        "model.router.expert_bias=true",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
    ),
}
SKIP_STEPS = ("train.steps=5", "checkpoint.interval=1", "train.on_bad_loss=skip")
ABORT = ("train.steps=6", "checkpoint.interval=1", "parallel.expert=2")
ON_TWO: dict[str, Job] = {
    "abort_nan": Job(ABORT, {4: "nan"}, rank=1),
    "abort_gradient": Job(ABORT, {4: "gradient"}, rank=1),
    **{
        f"skip_{name}": Job((*SKIP_STEPS, *overrides), {3: "gradient", 4: "inf"}, rank=1)
        for name, overrides in SKIP.items()
    },
    "rolled_2": Job((*EIGHT, "train.on_bad_loss=rollback"), {2: "gradient"}, rank=1),
    "rolled_6": Job((*EIGHT, "train.on_bad_loss=rollback"), {6: "gradient"}, rank=1),
    "skipped_2": Job((*EIGHT, "train.on_bad_loss=skip"), {2: "gradient"}, rank=1),
    "skipped_6": Job((*EIGHT, "train.on_bad_loss=skip"), {6: "gradient"}, rank=1),
    "spike": Job(
        ("train.steps=14", "train.on_bad_loss=skip", "train.spike_factor=2.0"),
        {5: "spike", 12: "spike", 13: "spike backwards"},
        rank=1,
    ),
}
ON_ONE: dict[str, Job] = {
    "whole": Job(SIX_BY_THREE, {2: "nan"}),
    "many_skips": Job(
        ("train.steps=9", "train.on_bad_loss=skip", "train.max_skips=2"),
        {2: "nan", 3: "nan", 4: "nan"},
    ),
    "many_rollbacks": Job(
        (
            "train.steps=6",
            "checkpoint.interval=2",
            "train.on_bad_loss=rollback",
            "train.max_rollbacks=1",
        ),
        {3: "nan", 5: "nan"},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("runs")
    whole = step_folder(folder / "whole", 3)
    resumed = {"resumed": Job((*SIX_BY_THREE, f"checkpoint.resume={whole}"))}
    return train(folder, ON_ONE | resumed, processes=1) | train(folder, ON_TWO, processes=2)


@pytest.mark.parametrize(
    ("name", "named"),
    [("abort_nan", "the loss is nan"), ("abort_gradient", "the gradient norm is")],
)
def test_abort_names_the_step_and_saves_nothing_of_it(
    runs: dict[str, Ended], name: str, named: str
) -> None:
    run = runs[name]
    assert run.codes == [1, 1], run.said
    assert f"step 4: {named}" in run.said
    assert "train.on_bad_loss=abort" in run.said
    assert [record["step"] for record in records(run.folder)] == [1, 2, 3]
    saved = sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))
    assert saved[-1] == "step_00000003"
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("name", SKIP)
def test_a_skipped_step_changes_nothing(runs: dict[str, Ended], name: str) -> None:
    run = runs[f"skip_{name}"]
    assert run.codes == [0, 0], run.said
    found = records(run.folder)
    assert [record.get("skipped") for record in found] == [None, None, 1, 1, None]
    assert found[3]["loss"] is None
    assert found[2]["loss"] is not None
    assert_same_state(step_folder(run.folder, 3), step_folder(run.folder, 2))
    assert_same_state(step_folder(run.folder, 4), step_folder(run.folder, 2))
    after, before = tensors(step_folder(run.folder, 5)), tensors(step_folder(run.folder, 4))
    assert any(not torch.equal(after[key], before[key]) for key in after)
    assert all(tensor.isfinite().all() for tensor in after.values())
    # The schedule counts steps, applied or not.
    assert len({record["lr"] for record in found}) == 5


def test_a_run_resumes_exactly_after_a_skip(runs: dict[str, Ended]) -> None:
    whole, resumed = runs["whole"], runs["resumed"]
    assert (whole.codes, resumed.codes) == ([0], [0]), whole.said + resumed.said
    for key in ("loss", "lr", "grad_norm", "tokens"):
        assert records(resumed.folder)[-1][key] == records(whole.folder)[-1][key]
    assert_same_state(step_folder(resumed.folder, 6), step_folder(whole.folder, 6))


def test_too_many_skips_end_the_run(runs: dict[str, Ended]) -> None:
    run = runs["many_skips"]
    assert run.codes == [1]
    assert "step 4: the loss is nan" in run.said
    assert "train.max_skips=2" in run.said
    assert len(records(run.folder)) == 3


@pytest.mark.parametrize("bad", [2, 6])
def test_rollback_leaves_the_batch_out(runs: dict[str, Ended], bad: int) -> None:
    """Before the first checkpoint and after it; the result is that of skipping the one batch."""
    rolled, skipped = runs[f"rolled_{bad}"], runs[f"skipped_{bad}"]
    assert (rolled.codes, skipped.codes) == ([0, 0], [0, 0]), rolled.said
    assert "rolling back" in rolled.said
    found, expected = records(rolled.folder), records(skipped.folder)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert [record.get("skipped") for record in found] == [
        1 if step == bad else None for step in range(1, 9)
    ]
    for key in ("loss", "lr", "tokens"):
        assert [record[key] for record in found] == [record[key] for record in expected]
    assert_same_state(step_folder(rolled.folder, 8), step_folder(skipped.folder, 8))
    told = json.loads((rolled.folder / "run.json").read_text())["faults"]
    assert [(fault["step"], fault["action"]) for fault in told] == [
        (bad, "rollback"),
        (bad, "skip"),
    ]


def test_too_many_rollbacks_end_the_run(runs: dict[str, Ended]) -> None:
    run = runs["many_rollbacks"]
    assert run.codes == [1]
    assert "step 5: the loss is nan" in run.said
    assert "train.max_rollbacks=1" in run.said


def test_a_spike_is_skipped_on_every_rank(runs: dict[str, Ended]) -> None:
    run = runs["spike"]
    assert run.codes == [0, 0], run.said
    spikes = [record for record in records(run.folder) if record.get("skipped")]
    assert spikes
    # Not step 5: there are too few losses to compare with.
    assert all(record["step"] in (12, 13) for record in spikes)
    assert all(math.isfinite(record["loss"]) and record["loss"] > 10 for record in spikes)
    assert "train.spike_factor=2" in run.said


def poke_and_look(overrides: tuple[str, ...]) -> list[bool]:
    """Whether the state is finite before and after rank 1's gets a NaN."""
    trainer = build_trainer(("experiment=tiny_mone", "device=cpu", *overrides))
    looked = [trainer.stepper.state_is_finite()]
    if dist.get_rank() == 1:
        next(trainer.chunks[0].parameters()).data.view(-1)[0] = math.nan
    return [*looked, trainer.stepper.state_is_finite()]


def test_a_state_that_is_not_finite_is_seen_on_every_rank(two_processes: Processes) -> None:
    assert two_processes.run(poke_and_look, ()) == [[True, False]] * 2


def test_rollback_without_checkpoints_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mone_megatron.pretrain", *RUN, f"run.dir={tmp_path / 'run'}"]
    result = subprocess.run(
        [*command, "train.on_bad_loss=rollback"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "checkpoint.interval" in result.stderr
    assert not (tmp_path / "run").exists()
