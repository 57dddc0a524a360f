"""tools/serve.py says what is wrong with the request before it says what is not installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mone_megatron.commands.serve import main


def no_folder(where: Path) -> None:
    """Leaves the place empty."""


def a_file(where: Path) -> None:
    where.write_text("text")


def an_empty_folder(where: Path) -> None:
    where.mkdir()


def a_run_without_checkpoints(where: Path) -> None:
    (where / "checkpoints").mkdir(parents=True)


def config(text: str | bytes) -> Callable[[Path], None]:
    def write(where: Path) -> None:
        where.mkdir()
        (where / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def damaged_checkpoint(where: Path) -> None:
    where.mkdir()
    (where / "manifest.json").write_text("{")


MISREAD = json.dumps({"model_type": "olmoe", "rms_norm_eps": 1e-6, "norm_topk_prob": False})
OURS = json.dumps({"model_type": "mone", "max_position_embeddings": 64})


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (no_folder, [], "there is no such folder; give a run, a checkpoint or an export"),
        (a_file, [], "there is no such folder"),
        (an_empty_folder, [], "holds neither checkpoints nor config.json"),
        (a_run_without_checkpoints, [], "checkpoint"),
        (damaged_checkpoint, [], "manifest.json"),
        (config("{"), [], "config.json: is not JSON"),
        (config(b"\xff\xfe"), [], "config.json: is not JSON"),
        (config("[1, 2]"), [], "config.json: holds no JSON object"),
        (config(MISREAD), [], "export it with --architecture mone"),
        (config(OURS), ["--port", "0"], "--port: 0 is not in 1..65535"),
        (config(OURS), ["--port", "70000"], "--port: 70000 is not in 1..65535"),
    ],
)
def test_the_model_and_the_options_come_before_the_engine(
    make: Callable[[Path], None],
    options: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = tmp_path / "model"
    make(where)
    # An interpreter without vLLM: looked at last, it is what a right request ends with.
    assert main([str(where), "--vllm-python", sys.executable, *options]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "no vLLM" not in said


@pytest.mark.parametrize(
    "text", [OURS, json.dumps({"model_type": "gpt2", "n_positions": 64}), json.dumps({})]
)
def test_a_right_request_ends_with_how_vllm_is_installed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "model"
    config(text)(where)
    assert main([str(where), "--vllm-python", sys.executable, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"no vLLM (looked in {sys.executable})" in said
    assert "install vllm==" in said
