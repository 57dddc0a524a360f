"""Checkpoints: a killed run resumes exactly, and any layout takes up any other's state."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from mone_megatron.testing.launch import REPOSITORY, run_layouts
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer
from mone_megatron.testing.warm_start import run_python

QUIET = (
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "device.threads=1",
)
RUN = (
    "experiment=tiny_mone",
    *QUIET,
    "train.steps=12",
    "train.global_batch_size=4",
    "checkpoint.interval=3",
)
KEEP_ALL = "checkpoint.keep_last=10"
MAINS = REPOSITORY / "tests" / "faults" / "many_mains.py"


def _records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, masters and moments of a checkpoint, by name."""
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(checkpoint))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def _assert_bitwise_equal(actual: Path, expected: Path) -> None:
    left, right = _tensors(actual), _tensors(expected)
    assert left.keys() == right.keys()
    assert any(key.startswith("optimizer.exp_avg_sq.") for key in right)
    differing = [key for key in right if not torch.equal(left[key], right[key])]
    assert not differing


def _step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


BF16 = (*RUN, "device.dtype=bf16", "train.steps=4", "checkpoint.interval=2", KEEP_ALL)
DROPOUT = (*RUN, "model.hidden_dropout=0.1", "model.attention_dropout=0.1", KEEP_ALL)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of one process that nothing interrupts, and what goes on from them."""
    folder = tmp_path_factory.mktemp("single")
    jobs = {
        "run": (*RUN, KEEP_ALL),
        "without_saves": (*RUN, "checkpoint.interval=0"),
        "bf16": BF16,
        "bf16_resumed": (*BF16, f"checkpoint.resume={_step(folder / 'bf16', 2)}"),
        "dropout": DROPOUT,
        "dropout_resumed": (*DROPOUT, f"checkpoint.resume={_step(folder / 'dropout', 6)}"),
    }
    run_layouts(jobs, processes=1, folder=folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(single: Path) -> Path:
    return single / "run"


@pytest.fixture(scope="module")
def one_kept_process() -> Iterator[Processes]:
    with Processes(1) as one:
        yield one


def test_checkpointing_does_not_change_the_run(single: Path) -> None:
    losses = [record["loss"] for record in _records(single / "run")]
    assert [record["loss"] for record in _records(single / "without_saves")] == losses


# In `make test` tests/faults/test_kills.py kills a run, also inside its saves.
@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(uninterrupted: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mone_megatron.pretrain", "device=cpu", *RUN]
    command += [f"run.dir={tmp_path}", "checkpoint.resume=auto", KEEP_ALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = 0
    for wait_for_step in (4, 8):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
        )
        metrics = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= wait_for_step):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 2
    final = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert final.returncode == 0, final.stderr
    assert "resumed from" in final.stderr
    records, expected = _records(tmp_path), _records(uninterrupted)
    assert [record["step"] for record in records] == list(range(1, 13))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[key] for record in records] == [record[key] for record in expected]
    _assert_bitwise_equal(_step(tmp_path, 12), _step(uninterrupted, 12))


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one_without_distributed_optimizer": (1, ("parallel.distributed_optimizer=false",)),
    "dp2": (2, ()),
    "ep2": (2, ("parallel.expert=2",)),
    "ep2_without_distributed_optimizer": (
        2,
        ("parallel.expert=2", "parallel.distributed_optimizer=false"),
    ),
    "tp2_ep1_etp1": (2, ("parallel.tensor=2",)),
    "tp2_etp2": (2, ("parallel.tensor=2", "parallel.expert_tensor=2")),
    "pp2": (2, ("parallel.pipeline=2",)),
    "pp2_interleaved": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "tp2_ep4": (4, ("parallel.tensor=2", "parallel.expert=4")),
    "pp2_ep2": (4, ("parallel.pipeline=2", "parallel.expert=2")),
}


# Those that train on in `make test`, one for each kind of parallelism; the others do in
# `make test-slow`. The state of all of them is compared bitwise below.
FEW = ("ep2", "tp2_etp2", "pp2_interleaved", "tp2_ep4")
TRAIN_ON = {"few": FEW, "rest": tuple(name for name in LAYOUTS if name not in FEW)}
CASES = [
    pytest.param(part, name, marks=[pytest.mark.slow] if part == "rest" else [])
    for part, names in TRAIN_ON.items()
    for name in names
]


@pytest.fixture(scope="module")
def resharded(
    uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Where a part of the layouts trained, launched when it is first asked for.

    Each layout takes up step 3 of the single process, trains to step 12 and saves; then the single
    process takes up step 6 of that and trains to step 12.
    """

    @functools.cache
    def trained(part: str) -> Path:
        folder = tmp_path_factory.mktemp(f"resharded_{part}")
        names = TRAIN_ON[part]
        away = (*RUN, KEEP_ALL, f"checkpoint.resume={_step(uninterrupted, 3)}")
        for processes in (1, 2, 4):
            jobs = {
                name: (*away, *overrides)
                for name, (size, overrides) in LAYOUTS.items()
                if size == processes and name in names
            }
            if jobs:
                run_layouts(jobs, processes=processes, folder=folder)
        back = {
            f"{name}_back": (*RUN, KEEP_ALL, f"checkpoint.resume={_step(folder / name, 6)}")
            for name in names
        }
        run_layouts(back, processes=1, folder=folder)
        return folder

    return trained


@pytest.mark.parametrize(("part", "name"), CASES)
def test_layouts_take_up_each_others_checkpoints(
    uninterrupted: Path, resharded: Callable[[str], Path], part: str, name: str
) -> None:
    expected = {record["step"]: record for record in _records(uninterrupted)}
    folder = resharded(part)
    away, back = _records(folder / name), _records(folder / f"{name}_back")
    assert [record["step"] for record in away] == list(range(4, 13))
    assert [record["step"] for record in back] == list(range(7, 13))
    for record in (*away, *back):
        assert record["loss"] == pytest.approx(expected[record["step"]]["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(expected[record["step"]]["grad_norm"], rel=1e-4)
        assert record["lr"] == expected[record["step"]]["lr"]
        assert record["tokens"] == expected[record["step"]]["tokens"]


def load_and_save(overrides: tuple[str, ...], source: str, target: str) -> None:
    """Take up a checkpoint on this layout and save it again, nothing trained."""
    trainer = build_trainer(
        (*RUN, "device=cpu", *overrides, f"checkpoint.resume={source}", f"run.dir={target}")
    )
    position = trainer.checkpointer.resume()
    assert position.step == 12
    trainer.checkpointer.save(position)


@pytest.mark.parametrize("name", [name for name, (size, _) in LAYOUTS.items() if size <= 2])
def test_weights_and_moments_move_between_layouts_bitwise(
    uninterrupted: Path,
    one_kept_process: Processes,
    two_processes: Processes,
    tmp_path: Path,
    name: str,
) -> None:
    size, overrides = LAYOUTS[name]
    away, back = tmp_path / "away", tmp_path / "back"
    source = _step(uninterrupted, 12)
    here = two_processes if size == 2 else one_kept_process
    here.run(load_and_save, overrides, str(source), str(away))
    _assert_bitwise_equal(_step(away, 12), source)
    one_kept_process.run(load_and_save, (), str(_step(away, 12)), str(back))
    _assert_bitwise_equal(_step(back, 12), source)


@pytest.mark.parametrize("name", [name for name, (size, _) in LAYOUTS.items() if size == 4])
def test_weights_and_moments_move_to_four_processes_bitwise(
    uninterrupted: Path, four_processes: Processes, tmp_path: Path, name: str
) -> None:
    source = _step(uninterrupted, 12)
    four_processes.run(load_and_save, LAYOUTS[name][1], str(source), str(tmp_path))
    _assert_bitwise_equal(_step(tmp_path, 12), source)


def test_bf16_masters_are_kept(single: Path) -> None:
    _assert_bitwise_equal(_step(single / "bf16_resumed", 4), _step(single / "bf16", 4))
    assert any(key.startswith("optimizer.master.") for key in _tensors(_step(single / "bf16", 4)))


def test_dropout_resumes_exactly(single: Path) -> None:
    _assert_bitwise_equal(_step(single / "dropout_resumed", 12), _step(single / "dropout", 12))


# An override that makes it another run, and what the refusal names.
OTHER_RUNS = {
    "train.seed=7": "train.seed",
    "train.steps=13": "train.steps",
    "train.global_batch_size=16": "train.global_batch_size",
    "model.norm_eps=1e-5": "model.norm_eps",
    "data.split=[0.9,0.1,0.0]": "data_fingerprint",
    "device.dtype=bf16": "dtype",
}


@pytest.fixture(scope="module")
def refusals(
    uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """How the command line of each other run ended, one after another in one process."""
    folder = tmp_path_factory.mktemp("refusals")
    common = ("device=cpu", *RUN, f"checkpoint.resume={_step(uninterrupted, 6)}")
    jobs = [
        {"arguments": [*common, f"run.dir={folder / 'run'}", override], "environment": {}}
        for override in OTHER_RUNS
    ]
    listed = folder / "mains.json"
    listed.write_text(json.dumps({"jobs": jobs, "watch": False}), encoding="utf-8")
    run_python([str(MAINS), str(listed)], folder=REPOSITORY).check_returncode()
    ended = json.loads((folder / "mains.ended.json").read_text(encoding="utf-8"))
    return dict(zip(OTHER_RUNS, ended, strict=True))


@pytest.mark.parametrize("override", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(
    refusals: dict[str, dict[str, Any]], override: str
) -> None:
    code, said = refusals[override]["code"], refusals[override]["said"]
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert any(OTHER_RUNS[override] in line for line in lines), said
    assert "Traceback" not in said


def test_a_disk_that_is_full_leaves_the_checkpoints_before(
    uninterrupted: Path, tmp_path: Path
) -> None:
    limit = 1_000_000  # bytes a file may have: less than a checkpoint's, more than all others'
    resume = f"checkpoint.resume={_step(uninterrupted, 3)}"
    code = (
        "import resource, sys; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from mone_megatron.pretrain import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["device=cpu", *RUN, resume, f"run.dir={tmp_path}"]
    result = run_python(["-c", code, *arguments], folder=REPOSITORY)
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert str(tmp_path / "checkpoints") in lines[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert [record["step"] for record in _records(tmp_path)] == [4, 5, 6]
