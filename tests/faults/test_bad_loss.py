"""Row 13: a loss or gradient that goes wrong on one rank; every rank does the same about it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faults_helpers import records, step_folder
from faults_runs import TINY, attempt, pretrain
from faults_table import Tally
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mone_megatron.testing.launch import REPOSITORY, rank_variables, wait_for_all
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer
from mone_megatron.testing.warm_start import WarmProcess

Count = Callable[[int, str], AbstractContextManager[Tally]]
RUN = (*TINY, "checkpoint.keep_last=20")
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
    said = [folder / f"codes-{processes}-{rank}" for rank in range(processes)]
    workers = [
        WarmProcess(
            [str(SCRIPT), str(job_file)],
            environment=os.environ | rank_variables(rank, processes),
            folder=REPOSITORY,
            stdout=said[rank],
        )
        for rank in range(processes)
    ]
    codes = wait_for_all(workers, 900)
    assert codes == [0] * processes, [path.read_text() for path in folder.glob("*.said.*")]
    outputs = [path.read_text(encoding="utf-8") for path in said]
    ended = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        name: Ended(
            folder / name,
            [codes[number] for codes in ended],
            (folder / f"{name}.said.0").read_text(encoding="utf-8"),
        )
        for number, name in enumerate(jobs)
    }


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(checkpoint))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def assert_same_state(left: Path, right: Path) -> None:
    first, second = tensors(left), tensors(right)
    assert first.keys() == second.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in first)
    assert not [key for key in first if not torch.equal(first[key], second[key])]


SKIPPED = "NaN, Inf or a NaN gradient on one rank: no rank applies the step, bitwise"
ABORTED = "NaN or a NaN gradient on one rank: all ranks end, no checkpoint of the step"
ROLLED_BACK = "the same, rolled back: bitwise the run that skipped the batch"
SPIKE = "a spike on one rank: skipped by all"
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


# With the full counts: every kind on each rank of each layout of two. A pipeline's first stage
# has no loss that could go wrong.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp": (),
    "ep": ("parallel.expert=2",),
    "tp": ("parallel.tensor=2",),
    "pp": ("parallel.pipeline=2",),
}
KINDS = ("nan", "inf", "gradient")
EVERYWHERE = [
    (layout, kind, rank)
    for layout in LAYOUTS
    for kind in KINDS
    for rank in (0, 1)
    if (layout, rank) != ("pp", 0) or kind == "gradient"
]


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
    runs: dict[str, Ended], tally: Count, name: str, named: str
) -> None:
    with tally(13, ABORTED) as t, attempt(t, name):
        assert_aborted(runs[name], named)


def assert_aborted(run: Ended, named: str) -> None:
    assert run.codes == [1, 1], run.said
    assert f"step 4: {named}" in run.said
    assert "train.on_bad_loss=abort" in run.said
    assert [record["step"] for record in records(run.folder)] == [1, 2, 3]
    saved = sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))
    assert saved[-1] == "step_00000003"
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("name", SKIP)
def test_a_skipped_step_changes_nothing(runs: dict[str, Ended], tally: Count, name: str) -> None:
    with tally(13, SKIPPED) as t, attempt(t, name):
        assert_skipped(runs[f"skip_{name}"])


def assert_skipped(run: Ended) -> None:
    assert run.codes == [0, 0], run.said
    found = records(run.folder)
    assert [record.get("skipped") for record in found] == [None, None, 1, 1, None]
    assert_same_state(step_folder(run.folder, 3), step_folder(run.folder, 2))
    assert_same_state(step_folder(run.folder, 4), step_folder(run.folder, 2))
    after, before = tensors(step_folder(run.folder, 5)), tensors(step_folder(run.folder, 4))
    assert any(not torch.equal(after[key], before[key]) for key in after)
    assert all(tensor.isfinite().all() for tensor in after.values())
    # The schedule counts steps, applied or not.
    assert len({record["lr"] for record in found}) == 5


def test_the_record_of_a_skipped_step_has_its_loss(runs: dict[str, Ended]) -> None:
    found = records(runs["skip_distributed_optimizer"].folder)
    # A gradient that is not finite, then a loss.
    assert found[2]["loss"] is not None
    assert found[3]["loss"] is None


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
def test_rollback_leaves_the_batch_out(runs: dict[str, Ended], tally: Count, bad: int) -> None:
    """Before the first checkpoint and after it; the result is that of skipping the one batch."""
    with tally(13, ROLLED_BACK) as t, attempt(t, f"step {bad}"):
        assert_rolled_back(runs[f"rolled_{bad}"], runs[f"skipped_{bad}"], bad)


def assert_rolled_back(rolled: Ended, skipped: Ended, bad: int) -> None:
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


def test_a_spike_is_skipped_on_every_rank(runs: dict[str, Ended], tally: Count) -> None:
    with tally(13, SPIKE) as t, attempt(t, "spike"):
        assert_spike_skipped(runs["spike"])


def assert_spike_skipped(run: Ended) -> None:
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


def test_a_state_that_is_not_finite_is_seen_on_every_rank(
    two_processes: Processes, tally: Count
) -> None:
    with tally(13, "a NaN in the weights of one rank: not saved") as t:
        seen = two_processes.run(poke_and_look, ())
        t.check(seen == [[True, False]] * 2, f"seen before and after, by rank: {seen}")


def test_rollback_without_checkpoints_is_refused(tmp_path: Path) -> None:
    result = pretrain(*RUN, f"run.dir={tmp_path / 'run'}", "train.on_bad_loss=rollback")
    assert result.code == 2
    assert "checkpoint.interval" in result.said
    assert not (tmp_path / "run").exists()


def test_every_kind_on_every_rank_of_every_layout(tmp_path: Path, tally: Count, full: bool) -> None:
    if not full:
        pytest.skip("with --faults-full")
    jobs = {
        f"{policy} {layout} {kind} on rank {rank}": Job(
            (*common, *LAYOUTS[layout]), dict.fromkeys(steps, kind), rank
        )
        for layout, kind, rank in EVERYWHERE
        for policy, common, steps in (("skip", SKIP_STEPS, (3, 4)), ("abort", ABORT[:2], (4,)))
    }
    ended = train(tmp_path, jobs, processes=2)
    with tally(13, SKIPPED) as skipped, tally(13, ABORTED) as aborted:
        for name, run in ended.items():
            if name.startswith("skip"):
                with attempt(skipped, name):
                    assert_skipped(run)
            else:
                with attempt(aborted, name):
                    assert_aborted(
                        run, "the gradient norm is" if "gradient" in name else "the loss is"
                    )
