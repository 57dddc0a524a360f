"""A run, its plan, its report, its export and an evaluation say one number of parameters."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = run_python(command, environment={"OMP_NUM_THREADS": "1"}, folder=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("tied", ["true", "false"])
def test_all_count_the_same(tmp_path: Path, tied: str) -> None:
    folder, export, plan = tmp_path / "run", tmp_path / "export", tmp_path / "plan.json"
    # 400 rows in a vocabulary that is padded to 512.
    overrides = (
        "experiment=tiny_mone", "data.vocab_size=400", f"model.tie_embeddings={tied}",
    )  # fmt: skip
    trained = run(
        *("-m", "mone_megatron.pretrain", *overrides, "train.steps=1", "checkpoint.interval=1"),
        *("data.max_megabytes=0.3", f"run.dir={folder}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("logging.wandb.mode=disabled", "device=cpu", "device.threads=1"),
    )
    recorded = json.loads((folder / "run.json").read_text())["parameters"]
    total = recorded["total"]
    shown = f"{total:,}"
    assert f"{shown} parameters, {recorded['activated_gate_counted']:,} activated" in trained.stderr
    # The page shows numbers with their digits in groups, or rounded beside them.
    assert re.search(rf"parameters, total\D+{shown}", (folder / "report.html").read_text())

    printed = run("tools/plan.py", *overrides, "--gpus", "1", "--json", str(plan)).stdout
    planned = json.loads(plan.read_text())["parameters"]
    assert {name: planned[name] for name in recorded} == recorded
    assert re.search(rf"total +{shown}\n", printed)
    padding = (512 - 400) * 64 * (1 if tied == "true" else 2)
    assert planned["vocabulary_padding"] == padding
    assert re.search(rf"padding of the vocabulary +{padding:,}  not of the model", printed)

    run("tools/export_hf.py", str(folder), "--output", str(export))
    assert shown in (export / "README.md").read_text()
    with safe_open(export / "model.safetensors", "pt") as weights:
        sizes = [weights.get_tensor(name).numel() for name in weights.keys()]  # noqa: SIM118
    assert sum(sizes) == total
