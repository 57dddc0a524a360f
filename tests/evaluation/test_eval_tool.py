"""tools/eval_hf.py: what it prints and writes, and what it refuses before it loads a model."""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from evaluation_helpers import TEXT

from mone_megatron.command_line import exit_status
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.tools import Main, load_tool

Models = tuple[Path, Path]


@pytest.fixture(scope="module")
def main() -> Main:
    return load_tool("eval_hf")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours: its vocabulary is padded, and it ends with an evaluation and a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        "experiment=tiny_mone", "device.kind=cpu", "train.steps=4", "train.eval_interval=2",
        "train.eval_steps=2", "checkpoint.interval=2", "data.max_megabytes=0.3",
        "data.vocab_size=400", f"data.cache_dir={folder / 'cache'}",
        "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    ]  # fmt: skip
    run_layouts({"mone": overrides}, processes=1, folder=folder)
    return folder / "mone"


def test_perplexity_is_the_trainers_validation_loss(
    main: Main, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    file = tmp_path / "out.json"
    earlier = run / "checkpoints" / "step_00000002"
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    earlier = run / "checkpoints" / names[0]
    code = main([str(run), str(earlier), "--perplexity", str(run), "--json", str(file)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(file.read_text())
    for model, step in zip(result["models"], (4, 2), strict=True):
        loss = next(score["value"] for score in model["scores"] if score["metric"] == "loss")
        trainers = records[step - 1]["val_loss"]
        assert loss == pytest.approx(trainers, abs=1e-4)
        assert model["step"] == model["corpora"][0]["trainer_step"] == step
        assert model["corpora"][0]["trainer_val_loss"] == trainers
        assert f"val_loss after step {step}: {trainers:.6f}" in printed.out
    assert result["models"][0]["corpora"][0]["windows"] == 16


def test_models_are_compared_on_tasks_and_text(
    main: Main,
    models: Models,
    example_tasks: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:2000], encoding="utf-8")
    file = tmp_path / "out.json"
    code = main(
        [*map(str, models), "--labels", "A", "B", "--tasks", *map(str, example_tasks),
         "--limit", "5", "--perplexity", str(text), "--json", str(file)]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    header = printed.out.splitlines()[0].split()
    assert header == ["task", "metric", "shots", "n", "A", "B", "B", "-", "A"]
    result = json.loads(file.read_text())
    one, two = ({(s["task"], s["metric"]): s for s in m["scores"]} for m in result["models"])
    assert set(one) == set(two)
    assert {metric for _, metric in one} == {
        "acc", "acc_norm", "perplexity", "loss", "bits_per_byte",
    }  # fmt: skip
    for change in result["differences"]:
        key = change["task"], change["metric"]
        assert change["paired"]
        assert change["value"] == pytest.approx(two[key]["value"] - one[key]["value"])
        if not math.isinf(change["value"]) and "acc" not in key[1]:
            # Both see the same text: less uncertain than two samples of their own.
            assert change["stderr"] < math.hypot(one[key]["stderr"], two[key]["stderr"])
    # Nothing that reads as significance; what is paired is the rule.
    table, _, legend = printed.out.partition("\n\n")
    assert "*" not in table
    assert "unpaired" not in table
    assert "unless it says unpaired" in legend
    assert f"{text}: " in printed.out
    assert f"({len(TEXT[:2000].encode())} bytes)".replace("2000", "2,000") in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL: give at least one"),
        (["MODEL"], "--tasks, --perplexity: nothing to measure"),
        (["MODEL", "MODEL", "--tasks", "sciq"], "one model is named twice"),
        (["MODEL", "--tasks", "sciq", "--limit", "0"], "--limit: 0 is too small"),
        (["MODEL", "--tasks", "sciq", "--labels", "a", "b"], "--labels: 2 labels for 1 models"),
        (["MODEL", "--tasks", "sciq"], "sciq: its data comes from the network"),
        (["MODEL", "--tasks", "nowhere.yaml"], "nowhere.yaml: no such task file"),
        (["nowhere/at/all", "--tasks", "sciq"], "nowhere/at/all: neither a folder with a model"),
        (["EMPTY", "--tasks", "sciq"], "holds neither checkpoints nor config.json"),
        (["BARE", "--tasks", "sciq"], "has no tokenizer"),
        (["MODEL", "--perplexity", "EMPTY"], "is no run"),
        (["MODEL", "--perplexity", "TEXT", "--seq-length", "999"], "--seq-length: 999 is more"),
        (["SMALL", "--perplexity", "TEXT"], "its tokenizer has token"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str],
    message: str,
    main: Main,
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT.txt").write_text(TEXT[:500], encoding="utf-8")
    shutil.copytree(models[0], tmp_path / "BARE")
    shutil.copytree(models[0], tmp_path / "SMALL")
    (tmp_path / "BARE" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "SMALL" / "config.json").read_text())
    (tmp_path / "SMALL" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    places = {name: str(tmp_path / name) for name in ("EMPTY", "BARE", "SMALL")}
    places |= {"MODEL": str(models[0]), "TEXT": str(tmp_path / "TEXT.txt")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_ctrl_c_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(options: Namespace) -> None:
        raise KeyboardInterrupt

    assert exit_status(stopped, Namespace()) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
