"""The main job as a user runs it: files, variants of the method, bad input, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mone_megatron.pretrain import USAGE_EXIT_CODE, main
from mone_megatron.testing.launch import REPOSITORY, run_layouts
from mone_megatron.testing.warm_start import run_python
from mone_megatron.train.health.signals import INTERRUPTED_EXIT_CODE

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
# A machine under load may be 20 times slower than an idle one.
PATIENCE = 300.0


def _records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _command(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mone_megatron.pretrain",
        "device=cpu",
        "device.threads=1",
        f"run.dir={folder}",
        *overrides,
    ]


def test_a_run_writes_all_its_files(tmp_path: Path) -> None:
    result = subprocess.run(
        _command(
            tmp_path,
            "experiment=tiny_mone",
            "train.steps=4",
            "train.eval_interval=2",
            "train.eval_steps=1",
            "logging.layer_interval=2",
        ),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    records = _records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [("val_loss" in record) for record in records] == [False, True, False, True]
    assert {"mone/balance_loss", "router/load_balancing_loss", "router/z_loss"} <= set(records[0])
    assert {"mone/load_entropy/layer_4", "router/dead_experts/layer_1"} <= set(records[1])
    assert "mone/load_entropy" not in records[0]
    assert records[-1]["tokens"] == 4 * 8 * 64
    # Every (token, expert) pair is counted once: tokens * experts_per_token / experts.
    assert records[1]["router/tokens_per_expert_mean"] == 8 * 64 * 2 / 8
    summary = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed"
    assert summary["tokens"] == records[-1]["tokens"]
    assert (tmp_path / "config.yaml").is_file()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny_mone" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    # One line a step on a log, with what the issue asks for.
    line = next(line for line in result.stderr.splitlines() if line.startswith("step 4/4"))
    for part in ("loss", "expert balance", "neuron balance", "tok/s", "FLOPS", "left", "val"):
        assert part in line
    assert "Warning" not in result.stderr


# One run of two steps each, in one process: every variant trains and reports finite numbers.
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": ("device.dtype=bf16",),
    "keep_all": ("mone.keep_ratio=1.0",),
    "abs_gate": ("mone.score=abs_gate",),
    "signed_gate": ("mone.score=signed_gate",),
    "abs_product": ("mone.score=abs_product",),
    "sigmoid": ("model.activation=sigmoid",),
    "relu": ("model.activation=relu", "mone.keep_ratio=0.75"),
    "relu2": ("model.activation=relu2", "mone.balance.weights=all"),
    "relu2_everywhere": (
        "model.activation=relu2",
        "model.shared_expert_ffn_hidden_size=64",
        "model.first_dense_layers=1",
        "mone.apply_to=[routed,shared,dense]",
    ),
    "raw_balance": ("mone.balance.normalize=false",),
    "all_weights": ("mone.balance.weights=all",),
    "shared": ("model.shared_expert_ffn_hidden_size=64", "mone.apply_to=[routed,shared]"),
    "shared_gate": (
        "model.shared_expert_ffn_hidden_size=64",
        "model.shared_expert_gate=true",
        "mone.apply_to=[shared]",
    ),
    "first_dense": ("model.first_dense_layers=1", "mone.apply_to=[routed,dense]"),
    "dense_only": (
        "model.num_experts=0",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
        "model.router.z_loss_coeff=0.0",
        "mone.apply_to=[dense]",
    ),
    "sequence_balance": (
        "model.router.balance=[seq_aux_loss]",
        "model.router.balance_coeff=[0.01]",
    ),
    "global_balance": (
        "model.router.balance=[global_aux_loss]",
        "model.router.balance_coeff=[0.01]",
    ),
    "several_balances": (
        "model.router.balance=[aux_loss,seq_aux_loss]",
        "model.router.balance_coeff=[0.01,0.001]",
    ),
    "sinkhorn": ("model.router.balance=[sinkhorn]", "model.router.balance_coeff=[0.0]"),
    "expert_bias": (
        "model.router.score_function=sigmoid",
        "model.router.expert_bias=true",
        "model.router.balance=[none]",
        "model.router.balance_coeff=[0.0]",
    ),
    "tied": ("model.tie_embeddings=true",),
    "qkv_bias_no_qk_norm": ("model.qkv_bias=true", "model.qk_norm=false"),
    "wsd": ("optim.schedule=wsd", "optim.decay_fraction=0.5"),
    "linear": ("optim.schedule=linear",),
    "no_clipping": ("optim.clip_grad=0.0",),
    "dropout": ("model.attention_dropout=0.1", "model.hidden_dropout=0.1"),
    "loader_workers": ("data.num_workers=1",),
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of one process that only its files are read of."""
    folder = tmp_path_factory.mktemp("variants")
    small = (*QUIET, "model.num_layers=2", "train.global_batch_size=4")
    common = ("experiment=tiny_mone", *small, "train.steps=2", "logging.layer_interval=1")
    five = (*small, "train.steps=5")
    once = ("experiment=tiny_moe", "train.steps=1", *small)
    jobs = {name: (*common, *overrides) for name, overrides in VARIANTS.items()} | {
        "baseline": ("experiment=tiny_moe", *five),
        "keeps_all": ("experiment=tiny_mone", "mone.keep_ratio=1.0", *five),
        # Two in one folder.
        "again": (*once, "train.seed=1"),
        "./again": (*once, "train.seed=2"),
    }
    run_layouts(jobs, processes=1, folder=folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train(variants: Path, name: str) -> None:
    records = _records(variants / name)
    assert len(records) == 2
    assert all(value is not None for record in records for value in record.values())
    # The vocabulary has 512 entries: an untrained model is near log 512 = 6.24.
    assert 5.8 < records[0]["loss"] < 6.6
    assert records[1]["loss"] < records[0]["loss"] + 0.1


def test_variants_log_what_they_add(variants: Path) -> None:
    assert "mone/shared/load_entropy/layer_1" in _records(variants / "shared")[0]
    assert "mone/dense/load_entropy/layer_1" in _records(variants / "first_dense")[0]
    assert "router/seq_load_balancing_loss" in _records(variants / "sequence_balance")[0]
    assert "router/global_load_balancing_loss" in _records(variants / "global_balance")[0]
    assert {"router/load_balancing_loss", "router/seq_load_balancing_loss"} <= set(
        _records(variants / "several_balances")[0]
    )
    # Keeping every neuron is the plain expert: no selection, no balance loss.
    assert "mone/balance_loss" not in _records(variants / "keep_all")[0]


def test_keeping_all_neurons_is_the_moe_baseline_bitwise(variants: Path) -> None:
    baseline, keeps_all = _records(variants / "baseline"), _records(variants / "keeps_all")
    assert len(baseline) == 5
    for moe, mone in zip(baseline, keeps_all, strict=True):
        assert moe["loss"] == mone["loss"]
        assert moe["grad_norm"] == mone["grad_norm"]


# Arguments after experiment=tiny_mone, and what the one-line error must name.
BAD_INPUT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (("train.stepz=3",), ("train.stepz", "train.steps")),
    "unknown experiment": (("experiment=tiny_mon",), ("tiny_mon", "tiny_mone")),
    "wrong type": (("train.steps=many",), ("train.steps",)),
    "experts over ranks": (("parallel.expert=3",), ("parallel.expert",)),
    "batch": (("train.global_batch_size=7",), ("train.global_batch_size",)),
    "layers over stages": (("parallel.pipeline=3",), ("parallel.pipeline",)),
    "K of 0": (("mone.keep_ratio=0.001",), ("mone.keep_ratio",)),
    "missing data": (
        ("data.source=indexed", "data.paths=[no/such/corpus]"),
        ("data.paths[0]", "no/such/corpus"),
    ),
    "no data named": (("data.source=indexed",), ("data.paths",)),
    "token past the vocabulary": (("model.vocab_size=100",), ("model.vocab_size",)),
    "a sequence that context ranks cannot split": (
        ("parallel.context=2", "train.seq_length=98"),
        ("train.seq_length",),
    ),
    "a setting that megatron-core has not": (
        ("megatron.transformer.moe_permute_fusoin=true",),
        ("megatron.transformer.moe_permute_fusoin", "did you mean moe_permute_fusion"),
    ),
    "config that would run code": (("+model._target_=os.system",), ("_target_",)),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_naming_the_key(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD_INPUT[case]
    code = main(["experiment=tiny_mone", *arguments, f"run.dir={tmp_path / 'run'}", *QUIET])
    error = capfd.readouterr().err
    assert code == USAGE_EXIT_CODE
    assert not dist.is_initialized()
    assert not (tmp_path / "run").exists()
    lines = error.splitlines()
    assert all(line.startswith("error: ") for line in lines), error
    assert any(all(part in line for part in expected) for line in lines), error


def test_more_processes_than_the_layout_needs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["experiment=tiny_mone", "parallel.expert=2", *QUIET]) == USAGE_EXIT_CODE
    error = capfd.readouterr().err
    assert "parallel.expert" in error
    assert "3" in error


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    command = _command(tmp_path, "experiment=tiny_mone", "model.init_std=1e30", *QUIET)
    result = run_python(command[1:], folder=REPOSITORY)
    assert result.returncode == 1
    assert "training failed" in result.stderr
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_an_earlier_run_is_kept(variants: Path) -> None:
    earlier = json.loads((variants / "again/earlier/1/run.json").read_text(encoding="utf-8"))
    latest = json.loads((variants / "again/run.json").read_text(encoding="utf-8"))
    assert (earlier["seed"], latest["seed"]) == (1, 2)


def test_ctrl_c_leaves_readable_metrics_and_says_so(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc-per-node=2",
        *_command(tmp_path, "experiment=tiny_mone", "train.steps=5000", "parallel.expert=2")[1:],
        "logging.wandb.mode=disabled",
        "logging.progress=none",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends on Ctrl-C
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0
    assert "stopped by SIGINT after step" in output
    assert (
        "nothing was saved (checkpoint.interval=0); a run with checkpoint=auto can go on" in output
    )
    assert str(metrics) in output
    records = _records(tmp_path)
    assert len(records) >= 3
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    summary = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert summary["status"] == "interrupted"
    assert summary["steps"] == len(records)
    assert (tmp_path / "report.html").is_file()


def test_an_interrupted_process_saves_and_ends_with_the_documented_code(tmp_path: Path) -> None:
    saving = ("train.steps=5000", "checkpoint.interval=5000")
    process = subprocess.Popen(
        _command(tmp_path, "experiment=tiny_moe", *saving, *QUIET),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == INTERRUPTED_EXIT_CODE
    last = int(_records(tmp_path)[-1]["step"])
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{last:08d}"]
