"""Every shipped ablation is a sweep of valid runs, one folder each, compared at the end."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mone_megatron.config.layout import smallest_world_size
from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.config.validate import validate
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python

ABLATIONS = sorted((CONF_DIR / "ablation").glob("*.yaml"))
QUIET = (
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "device.threads=1",
)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        arguments, environment={"OMP_NUM_THREADS": "1"}, folder=REPOSITORY, timeout=300
    )


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("experiment", ["tiny_mone", "quickstart_mone", "qwen3_30b_a3b_mone"])
def test_every_point_of_the_sweep_is_a_valid_run(path: Path, experiment: str) -> None:
    ablation: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    sweep = ablation["hydra"]["sweeper"]["params"]
    points = list(itertools.product(*(str(values).split(",") for values in sweep.values())))
    assert len(points) >= 2
    ranks = smallest_world_size(compose([f"experiment={experiment}"]).parallel)
    found = set()
    for point in points:
        overrides = [f"{key}={value}" for key, value in zip(sweep, point, strict=True)]
        for group in ("model", "mone", "parallel"):
            given = ablation.get(group, {})
            overrides += [f"{group}.{key}={value}" for key, value in given.items()]
        config = compose([f"experiment={experiment}", *overrides])
        validate(config, world_size=ranks)
        found.add((config.model, config.mone))
    assert len(found) == len(points)


def test_a_sweep_runs_and_is_compared(tmp_path: Path) -> None:
    dirs = "run.dir=" + str(tmp_path) + "/${hydra:runtime.choices.mone}"
    arguments = ("experiment=tiny_mone", "train.steps=1", *QUIET, dirs)
    # As `make ablation` does: two processes, overrides before and after the flag.
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    done = _run(
        *(*launcher, "-m", "mone_megatron.pretrain", "device=cpu"),
        *("-m", "ablation=shared", *arguments),
    )
    assert done.returncode == 0, done.stderr
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) == 4
    names = {json.loads((folder / "run.json").read_text())["name"] for folder in folders}
    assert names == {"disabled", "quarter", "quarter_shared", "quarter_routed_shared"}
    compared = _run(
        "tools/compare_runs.py", *map(str, folders), "--output", str(tmp_path / "report")
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert (tmp_path / "report" / "comparison.html").exists()


def test_a_bad_point_ends_the_sweep_with_one_line(tmp_path: Path) -> None:
    done = _run(
        *("-m", "mone_megatron.pretrain", "-m", "experiment=tiny_mone", *QUIET),
        *("mone.keep_ratio=0.0,0.5", f"run.dir={tmp_path}/run"),
    )
    assert done.returncode == 2, done.stderr
    assert "error: mone.keep_ratio" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_ablation_without_a_sweep_is_refused() -> None:
    done = _run("-m", "mone_megatron.pretrain", "experiment=tiny_mone", "ablation=score")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: ablation: an ablation is a sweep over several runs; add -m "
        "(launch/slurm.sh: --sweep)"
    ]


def test_runs_of_a_sweep_are_told_apart_and_compared(tmp_path: Path) -> None:
    """Whatever is swept: no run.dir that differs has to be thought of."""
    done = _run(
        *("-m", "mone_megatron.pretrain", "-m", "experiment=tiny_mone", "device=cpu", *QUIET),
        *("train.steps=1", "mone.keep_ratio=0.25,0.5", "train.seed=1,2", f"run.dir={tmp_path}/all"),
    )
    assert done.returncode == 0, done.stderr
    labels = {f"keep_ratio_{ratio}-seed_{seed}" for ratio in (0.25, 0.5) for seed in (1, 2)}
    folders = {path.name for path in (tmp_path / "all").iterdir() if path.is_dir()}
    assert folders == labels
    for label in labels:
        record = json.loads((tmp_path / "all" / label / "run.json").read_text())
        assert record["name"] == f"tiny_mone-{label}"
    # The seeds are pooled.
    assert "configuration differs in:" in done.stdout
    assert (tmp_path / "all" / "comparison.html").is_file()


def test_a_bad_point_is_refused_before_the_first_run(tmp_path: Path) -> None:
    done = _run(
        *("-m", "mone_megatron.pretrain", "-m", "experiment=tiny_mone", "device=cpu", *QUIET),
        *("train.steps=1", "mone.keep_ratio=0.25,1.5", f"run.dir={tmp_path}/all"),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: mone.keep_ratio: ")
    assert list(tmp_path.iterdir()) == []
