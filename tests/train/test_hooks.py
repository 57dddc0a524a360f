"""Hooks: their numbers travel by name in the one collective of a step, and their state is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.methods.hooks import HOOKS
from mone_megatron.testing.launch import REPOSITORY, import_path, run_layouts
from mone_megatron.testing.processes import Processes, RankFailedError
from mone_megatron.testing.trainer import build_trainer
from mone_megatron.train.hooks.added import AddedHook
from mone_megatron.train.resume.checkpointer import Position

RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=4",
    "model.num_layers=2", "train.global_batch_size=4",
    "checkpoint.interval=2", "logging.wandb.mode=disabled", "logging.report=false",
    "logging.progress=none", "logging.layer_interval=0",
)  # fmt: skip

# A hook that sums tensors of several shapes, counts the collectives of all ranks, and has a state.
THEIRS = """
import torch
import torch.distributed as dist
from mone_megatron.methods.hook import Hook, HookMethod

class Summing(Hook):
    def __init__(self, session):
        self.rank, self.steps = dist.get_rank(), 0
        self.world = session.layout.world_size
        self.collectives = 0

    def reduce(self):
        own = torch.zeros(self.world)
        own[self.rank] = 10.0 ** self.rank
        matrix = torch.arange(6.0).view(2, 3) + self.rank
        return {"b": own, "a": matrix, "one": 1, "none": torch.zeros(0)}

    def record(self, report):
        self.steps += 1
        sums = report.sums
        assert list(sums) == ["b", "a", "one", "none"] and sums["none"].numel() == 0
        assert sums["a"].shape == (2, 3), sums["a"].shape
        now = dist.group.WORLD._get_sequence_number_for_group()
        collectives, self.collectives = now - self.collectives, now
        return {
            "theirs/ranks": float(sums["one"]),
            "theirs/own": float(sums["b"].sum()),
            "theirs/corner": float(sums["a"][1, 2]),
            "theirs/collectives": collectives,
            "theirs/steps": self.steps,
            "theirs/loss_is_recorded": report.record["loss"] == report.loss,
        }

    def state(self):
        return {"steps": self.steps}

    def set_state(self, state):
        self.steps = state["steps"]

METHOD = HookMethod(name="summing", formula="sums", source="a test", make=Summing)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "theirs.py").write_text(THEIRS)
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mone_megatron.methods]\nsumming = theirs:METHOD\n")
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with every hook of the registry, and the one above."""
    folder = tmp_path_factory.mktemp("runs")
    hooks = f"train.hooks=[{','.join([*HOOKS.names, 'summing'])}]"
    saved = f"checkpoint.resume={folder / 'one' / 'checkpoints' / 'step_00000002'}"
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = import_path(REPOSITORY, site)
    try:
        one = {"one": (*RUN, hooks), "plain": RUN, "resumed": (*RUN, hooks, saved)}
        run_layouts(one, processes=1, folder=folder)
        two = {"dp2": (*RUN, hooks), "ep2": (*RUN, hooks, "parallel.expert=2")}
        run_layouts(two, processes=2, folder=folder)
    finally:
        os.environ["PYTHONPATH"] = before
    return folder


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("dp2", 2), ("ep2", 2)])
def test_numbers_are_summed_over_ranks_by_name(runs: Path, name: str, ranks: int) -> None:
    for record in records(runs / name):
        assert record["theirs/ranks"] == ranks
        assert record["theirs/own"] == {1: 1.0, 2: 11.0}[ranks]
        assert record["theirs/corner"] == {1: 5.0, 2: 11.0}[ranks]
        assert record["theirs/loss_is_recorded"] == 1


@pytest.mark.parametrize(("name", "collectives"), [("one", 0), ("dp2", 1), ("ep2", 1)])
def test_a_step_has_one_collective_over_all_ranks(runs: Path, name: str, collectives: int) -> None:
    by_step = {int(record["step"]): record["theirs/collectives"] for record in records(runs / name)}
    # Step 2 saves after it is recorded, and 1 compares the names of the ranks' numbers.
    assert by_step[2] == by_step[4] == collectives


def test_hooks_change_nothing_of_the_training(runs: Path) -> None:
    for plain, record in zip(records(runs / "plain"), records(runs / "one"), strict=True):
        timed = {"step_seconds", "tokens_per_second", "tflops_ideal", "tflops_realised"}
        for key in plain.keys() - timed - {"checkpoint_seconds"}:
            assert record[key] == plain[key]


def test_a_resumed_run_goes_on_with_the_state_of_its_hooks(runs: Path) -> None:
    whole, resumed = records(runs / "one"), records(runs / "resumed")
    added = {key for key in whole[-1].keys() - records(runs / "plain")[-1].keys()}
    added -= {"theirs/collectives"}
    assert {"loss_average", "theirs/steps"} <= added
    for expected, record in zip(whole[2:], resumed, strict=True):
        assert {key: record[key] for key in added} == {key: expected[key] for key in added}


def test_loss_average_is_the_weighted_mean(runs: Path) -> None:
    losses: list[float] = []
    for record in records(runs / "one"):
        losses.append(record["loss"])
        weights = [0.98**age for age in range(len(losses))][::-1]
        mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        assert record["loss_average"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("layout", ["dp2", "ep2"])
def test_every_hook_records_the_same_in_every_layout(runs: Path, layout: str) -> None:
    for one, two in zip(records(runs / "one"), records(runs / layout), strict=True):
        assert two["loss_average"] == pytest.approx(one["loss_average"], rel=1e-5)
        assert one.keys() - {"checkpoint_seconds"} == two.keys() - {"checkpoint_seconds"}


def report(**changes: Any) -> StepReport:
    settings: dict[str, Any] = {
        "step": 1, "seconds": 1.0, "loss": 2.0, "grad_norm": 1.0, "tokens": 8, "skipped": 0,
        "fault": None, "stops": False, "sums": {}, "record": {"loss": 2.0},
    }  # fmt: skip
    return StepReport(**(settings | changes))


class Recording(Hook):
    def __init__(self, value: Any) -> None:
        self.value = value

    def record(self, report: StepReport) -> Record:
        return self.value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"loss": 1.0}, "train.hooks: mine records 'loss', which is there; rename it"),
        ({"mine": "fast"}, "train.hooks: mine records 'mine' as str; give a number"),
        ({"mine": torch.ones(1)}, "train.hooks: mine records 'mine' as Tensor; give a number"),
        ({"mine": None}, "train.hooks: mine records 'mine' as NoneType; give a number"),
    ],
)
def test_a_record_that_cannot_be_kept_is_named(recorded: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AddedHook("mine", Recording(recorded)).record(report())


class Summing(Hook):
    """Sums what it is told, in turn."""

    def __init__(self, values: list[dict[str, Any]]) -> None:
        self.values = values

    def reduce(self) -> dict[str, Tensor]:
        return self.values.pop(0)


def sum_in_turn(by_rank: list[list[dict[str, Any]]]) -> None:
    hook = AddedHook("mine", Summing(by_rank[dist.get_rank()]))
    for _ in range(len(by_rank[0])):
        hook.reduce()


@pytest.fixture(scope="module")
def two_processes() -> Any:
    with Processes(2) as processes:
        yield processes


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        # Another shape, another name and another order on one rank; then in the second step.
        ([[{"x": torch.zeros(2)}], [{"x": torch.zeros(3)}]], "on rank 1 and .* on rank 0"),
        ([[{"x": 1.0}], [{"y": 1.0}]], "the same names and shapes on every rank"),
        ([[{"x": 1.0, "y": 1.0}], [{"y": 1.0, "x": 1.0}]], "on rank 1 and .* on rank 0"),
        ([[{"x": 1.0}, {"x": 1.0, "y": 2.0}]] * 2, "the same names and shapes in every step"),
        ([[{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]] * 2, "after .* in the step before"),
        ([[{"x": "fast"}]] * 2, "over ranks, of type str; .* tensors or numbers"),
    ],
)
def test_numbers_that_cannot_be_summed_are_named(
    two_processes: Processes, by_rank: list[list[dict[str, Any]]], message: str
) -> None:
    with pytest.raises(RankFailedError, match=f"train.hooks: mine sums .*{message}"):
        two_processes.run(sum_in_turn, by_rank)


class Counting(Hook):
    def __init__(self, count: Any = 0) -> None:
        self.count = count

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def set_state(self, state: Any) -> None:
        self.count = state["count"]


def go_back(folder: str) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    overrides = ("experiment=tiny_moe", "device=cpu", f"run.dir={folder}", "data.max_megabytes=0.2")
    trainer = build_trainer(overrides, data_fingerprint="none", say=said.append)
    checkpointer, found = trainer.checkpointer, []
    # A checkpoint of before there were hooks, and one with the state of one.
    trainer.state.scheduler.step(1)
    checkpointer.save(Position(1, 512))
    first, second = Counting(5), Counting([1, 2])
    checkpointer.keep("first", first)
    found.append(first.count)
    first.count = 6
    checkpointer.roll_back()
    found.append(first.count)
    checkpointer.keep("second", second)
    first.count = 0.1 + 0.2
    trainer.state.scheduler.step(1)
    checkpointer.save(Position(2, 1024))
    first.count = second.count = 7
    checkpointer.roll_back()
    found += [first.count, second.count]
    try:
        checkpointer.keep("third", Counting({1, 2}))
    except ValueError as error:
        said.append(str(error))
    return found, said


def test_a_rollback_takes_the_state_of_hooks_back(tmp_path: Path) -> None:
    with Processes(1) as processes:
        ((found, said),) = processes.run(go_back, str(tmp_path))
    assert found == [5, 5, 0.1 + 0.2, [1, 2]]
    anew = [line for line in said if "begins anew" in line]
    assert len(anew) == 1
    assert anew[0].startswith("second begins anew")
    assert said[-1].startswith("train.hooks: third has a state that no checkpoint can hold")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.hooks=[loss_averag]", "train.hooks: the text 'loss_averag' is not one of"),
        ("train.hooks=[loss_average,loss_average]", "train.hooks: loss_average is named 2 times"),
        ("train.hooks=loss_average", "train.hooks: expected a list"),
    ],
)
def test_unknown_hooks_are_refused_before_torch_is_imported(override: str, message: str) -> None:
    code = (
        "import sys\nfrom mone_megatron.config.load import compose\n"
        "from mone_megatron.config.validate import validate\n"
        f"overrides = ['experiment=tiny_moe', 'device=cpu', {override!r}]\n"
        "try:\n    validate(compose(overrides), world_size=1)\n"
        "except ValueError as error:\n    print(error, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert message in run.stdout
    assert run.stdout.rstrip().endswith("False")
