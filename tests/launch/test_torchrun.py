"""launch/torchrun.sh: real processes, one machine and two "machines" on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.ports import free_ports

SCRIPT = REPOSITORY / "launch" / "torchrun.sh"
RUN = (
    "experiment=tiny_mone",
    "train.steps=2",
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
)
# A machine under load may be 20 times slower than an idle one.
PATIENCE = 500.0


def start(*arguments: str) -> subprocess.Popen[str]:
    """The script with this test's python as the active environment."""
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*launched: subprocess.Popen[str]) -> None:
    """All of them end with 0."""
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in launched]
    finally:
        for process in launched:
            process.kill()
            process.wait()
    codes = [process.returncode for process in launched]
    assert codes == [0] * len(launched), "\n".join(said)[-4000:]


def facts(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_overrides_arrive_untouched(tmp_path: Path) -> None:
    """By default, without a GPU: two processes on the CPU."""
    folder = tmp_path / "a run"
    name = "a 'b' [c] {d} $HOME * `e`; 100%"
    end(start(*RUN, f'run.name="{name}"', f'run.dir="{folder}"', "data.split=[0.9, 0.1, 0]"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["run"] == {"name": name, "dir": str(folder)}
    assert config["data"]["split"] == [0.9, 0.1, 0.0]
    assert (facts(folder)["world_size"], facts(folder)["device"]) == (2, "cpu")


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines(rendezvous: str, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    where = {
        "static": [
            ("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port))
            for node in (0, 1)
        ],
        "c10d": [(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=a run", "--local-addr=127.0.0.1")]
        * 2,
    }[rendezvous]
    run = (*RUN, "device=cpu", f"run.dir={tmp_path}")
    end(*[start("--nnodes", "2", "--nproc-per-node", "1", *at, "--", *run) for at in where])
    assert facts(tmp_path)["world_size"] == 2
    assert facts(tmp_path)["status"] == "completed"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nproc-per-node", "none", "x=1"], "--nproc-per-node: 'none' is not a whole number"),
        (["--nproc-per-node=0"], "--nproc-per-node: '0'"),
        (["--nnodes"], "--nnodes: a value is missing"),
        (["--nnodes", "--node-rank", "1"], "--nnodes: a value is missing"),
        (["--nnodes", "2", "x=1"], "--master-addr: missing"),
        (["--nnodes", "2", "--master-addr", "h"], "--node-rank: missing"),
        (["--nnodes", "2", "--master-addr", "h", "--node-rank", "2"], "--node-rank: 2 is not"),
        (["--rdzv-endpoint", "h:1"], "--rdzv-id: missing"),
        (["--rdzv-endpoint", "h", "--rdzv-id", "1"], "'h' is not HOST:PORT"),
        (["--rdzv-endpoint", "h:1", "--rdzv-id", "1", "--node-rank", "0"], "takes no --node-rank"),
        (["--local-addr", "h", "x=1"], "--local-addr: for c10d rendezvous only"),
        (["--gpus", "2"], "--gpus: unknown option"),
        (["experiment=tiny_mone", "--nnodes=2"], "--nnodes: options of the launcher stand before"),
    ],
)
def test_wrong_options_are_one_line(arguments: Sequence[str], told: str) -> None:
    process = start(*arguments)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert said.startswith("error: ")
    assert told in said
    assert said.count("\n") == 1


def test_help_names_every_option() -> None:
    process = start("--help")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    listed = SCRIPT.read_text(encoding="utf-8").split("known='", 1)[1].split("'", 1)[0].split()
    assert len(listed) == 8
    assert not [option for option in listed if option not in said]


def test_scripts_are_shellcheck_clean() -> None:
    scripts = sorted((REPOSITORY / "launch").glob("*.sh"))
    scripts += sorted((REPOSITORY / "launch").glob("*.sbatch"))
    # The development dependencies bring one.
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command is not None
    result = subprocess.run(
        [command, "-x", *map(str, scripts)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
