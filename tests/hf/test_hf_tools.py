"""The two command lines: a run to Hugging Face, back, and on with training."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mone_megatron.testing.launch import REPOSITORY, run_layouts
from mone_megatron.testing.tools import load_tool
from mone_megatron.testing.warm_start import run_python

_QUICK = [
    "device=cpu", "device.threads=1", "logging.report=false",
    "logging.wandb.mode=disabled", "train.steps=3",
]  # fmt: skip


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(
        [f"tools/{name}.py", *map(str, arguments)],
        environment={"OMP_NUM_THREADS": "1"},
        folder=REPOSITORY,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    overrides = ["experiment=tiny_mone", "checkpoint.interval=3", *_QUICK]
    run_layouts({"first": overrides}, processes=1, folder=folder)
    return folder


def test_there_back_and_on_with_training(run: Path) -> None:
    exported = tool("export_hf", run / "first", "--output", run / "hf")
    assert exported.returncode == 0, exported.stderr
    assert "checked: logits differ by at most" in exported.stdout
    assert "1,024 of 1,024 tokens" in exported.stdout
    imported = tool("import_hf", run / "hf", "--output", run / "back")
    assert imported.returncode == 0, imported.stderr
    lines = dict(line.split(": ", 1) for line in imported.stdout.splitlines() if ": " in line)
    checkpoint = run / "back" / "checkpoints" / "step_00000000"
    assert f"wrote {checkpoint}" in imported.stdout
    assert "mone.enabled=true" in lines["model keys"]
    # What is printed starts a run of those weights on two processes.
    overrides = [
        "experiment=tiny_mone",
        *lines["model keys"].split(),
        f"checkpoint.initialize={checkpoint}",
        f"data.tokenizer={checkpoint / 'tokenizer'}",
        "parallel.expert=2",
        "optim.lr=1e-6",
        "optim.min_lr=0",
        *_QUICK,
    ]
    run_layouts({"second": overrides}, processes=2, folder=run)
    first, second = (
        [json.loads(line)["loss"] for line in (run / name / "metrics.jsonl").open()]
        for name in ("first", "second")
    )
    assert second[0] < first[0] - 0.01  # it goes on from the weights of three steps


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("export_hf", ["nowhere", "--output", "x"], "nowhere: there is no such folder"),
        ("export_hf", ["conf", "--output", "x"], "conf: no checkpoint there; save some with"),
        ("export_hf", ["RUN", "--output", "x", "--dtype", "int8"], "--dtype: 'int8' is not saved"),
        ("export_hf", ["RUN", "--output", "x", "--shard-gb", "0"], "--shard-gb: 0 is not above 0"),
        ("import_hf", ["conf", "--output", "x"], "conf: holds no config.json; give the folder"),
        ("import_hf", ["conf", "--output", "x", "--dtype", "fp8"], "--dtype: 'fp8' is not one of"),
        (
            "import_hf",
            ["conf", "--output", "x", "--upcycle-experts-per-token", "2"],
            "--upcycle-experts-per-token: needs --upcycle-experts",
        ),
    ],
)
def test_bad_input_gets_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    message: str,
) -> None:
    known = {"RUN": str(run / "first"), "x": str(tmp_path / "x")}
    assert load_tool(name)([known.get(argument, argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (tmp_path / "x").exists()
