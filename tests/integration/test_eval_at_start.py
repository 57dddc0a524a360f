"""``train.eval_at_start``: a validation loss before the first step that changes nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mone_megatron.report.runs import load_run
from mone_megatron.testing.launch import run_layouts
from mone_megatron.train.run_directory import keep_metrics_up_to

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
RUN = (
    "experiment=tiny_mone",
    *QUIET,
    "train.steps=4",
    "train.global_batch_size=4",
    "model.num_layers=2",
    "train.eval_interval=2",
    "train.eval_steps=1",
    "logging.layer_interval=1",
)
AT_START = "train.eval_at_start=true"
SAVED = (*RUN, AT_START, "checkpoint.interval=2", "checkpoint.keep_last=10")
# What an evaluation could disturb: random streams, counts of neurons and experts, a schedule, a
# quantity that is steered by what is counted, biases that megatron-core moves.
DISTURBED = {
    "dropout": ("model.hidden_dropout=0.1", "model.attention_dropout=0.1"),
    "schedule": (
        "mone.keep_ratio_schedule=linear",
        "mone.keep_ratio_steps=4",
        "mone.keep_ratio_start=1.0",
    ),
    "steered": (
        "mone.rule=threshold",
        "mone.density.steers=tau",
        "mone.density.step=squared",
        "mone.density.target=0.25",
    ),
    "expert_bias": (
        "model.router.score_function=sigmoid",
        "model.router.expert_bias=true",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
    ),
}
_TIMES = ("seconds", "tokens_per_second", "tflops_realised", "tflops_ideal")


def _records(folder: Path) -> list[dict[str, float]]:
    """What metrics.jsonl holds, without how long anything took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(_TIMES)}
        | {"timed": float("step_seconds" in json.loads(line))}
        for line in lines
    ]


def _losses(folder: Path) -> list[tuple[float | None, ...]]:
    keys = ("step", "loss", "grad_norm", "val_loss")
    return [tuple(record.get(key) for key in keys) for record in _records(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    jobs = {name: (*RUN, *overrides) for name, overrides in DISTURBED.items()}
    jobs |= {f"{name}_at_start": (*given, AT_START) for name, given in jobs.items()}
    jobs["whole"] = (*RUN, AT_START, "mone.keep_ratio=1.0", "train.steps=1")
    jobs["saved"] = (*SAVED, "logging.tensorboard=true")
    jobs["named"] = (*SAVED, f"checkpoint.resume={folder / 'saved/checkpoints/step_00000002'}")
    run_layouts(jobs, processes=1, folder=folder)
    run_layouts({"stages": (*RUN, AT_START, "parallel.pipeline=2")}, processes=2, folder=folder)
    return folder


@pytest.mark.parametrize("name", DISTURBED)
def test_it_changes_nothing_but_its_own_record(runs: Path, name: str) -> None:
    plain, evaluated = _records(runs / name), _records(runs / f"{name}_at_start")
    assert [record["step"] for record in evaluated] == [0, 1, 2, 3, 4]
    assert evaluated[1:] == plain
    first = evaluated[0]
    scheduled = {"mone/keep_ratio": 1.0} if name == "schedule" else {}
    assert (
        first == {"step": 0, "tokens": 0, "timed": 0.0, "val_loss": first["val_loss"]} | scheduled
    )
    # The vocabulary has 512 entries: an untrained model is near log 512 = 6.24.
    assert 5.8 < first["val_loss"] < 6.6


def test_a_schedule_is_evaluated_where_it_begins(runs: Path) -> None:
    scheduled, whole = _records(runs / "schedule_at_start"), _records(runs / "whole")
    assert scheduled[0]["val_loss"] == whole[0]["val_loss"]


def test_layouts_agree_on_it(runs: Path) -> None:
    one, stages = _records(runs / "saved"), _records(runs / "stages")
    assert stages[0]["val_loss"] == pytest.approx(one[0]["val_loss"], rel=1e-5)


def test_a_run_that_goes_on_is_not_evaluated_again(runs: Path) -> None:
    before = _losses(runs / "saved")
    assert [record["step"] for record in _records(runs / "named")] == [3, 4]
    shutil.rmtree(runs / "saved" / "checkpoints" / "step_00000004")
    run_layouts({"saved": (*SAVED, "checkpoint.resume=auto")}, processes=1, folder=runs)
    assert _losses(runs / "saved") == before
    # Rolling back to the beginning keeps what was found there.
    shutil.copy(runs / "saved" / "metrics.jsonl", runs / "metrics.jsonl")
    assert keep_metrics_up_to(runs / "metrics.jsonl", 0) == 0
    assert _losses(runs) == before[:1]


def test_what_reads_and_shows_runs_has_it(runs: Path) -> None:
    run = load_run(runs / "saved")
    evaluated = run.series("val_loss")
    assert list(evaluated.steps) == [0, 2, 4]
    assert list(run.series("loss").steps) == [1, 2, 3, 4]
    assert run.median("step_seconds") is not None
    events = EventAccumulator(str(runs / "saved" / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("val_loss")}
    assert shown == pytest.approx(dict(zip(evaluated.steps, evaluated.values, strict=True)))


def test_a_run_that_ended_before_its_first_step_says_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "whole", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds no step: the run ended before its first one"):
        load_run(tmp_path / "run")
