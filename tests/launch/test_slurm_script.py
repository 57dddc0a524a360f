"""launch/slurm.sh without a SLURM: what it would submit, and what it refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mone_megatron.testing.launch import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm.sh"
TINY = "experiment=tiny_mone"


def slurm(
    *arguments: str, cwd: Path = REPOSITORY, site: str | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "MONE_SITE"}
    chosen = {"MONE_SITE": site} if site is not None else {}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=cwd,
        env=kept | {"VIRTUAL_ENV": sys.prefix} | chosen,
        capture_output=True,
        text=True,
        check=False,
    )


def job(*arguments: str, cwd: Path = REPOSITORY, site: str | None = None) -> str:
    """What would be submitted."""
    result = slurm("--dry-run", *arguments, cwd=cwd, site=site)
    assert result.returncode == 0, result.stderr
    # Bash reads it, whatever was written into it.
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
    return result.stdout


def refusal(*arguments: str) -> str:
    result = slurm("--dry-run", *arguments)
    assert result.returncode == 2, result.stdout
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH --" in line]


def overrides(text: str, task: int = 0) -> list[str]:
    """What the trainer of one task would be started with, as bash reads it."""
    settings = text.split("# --- settings\n", 1)[1].split("# --- launch/job.sbatch\n", 1)[0]
    result = subprocess.run(
        ["bash", "-c", settings + '\nprintf "%s\\0" "${overrides[@]}"'],
        env={"SLURM_ARRAY_TASK_ID": str(task), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split("\0")[:-1]


def test_a_gpu_job() -> None:
    """The command of docs/cluster.md."""
    text = job(*shlex.split("--nodes 4 --gpus-per-node=8 --time 24:00:00 experiment=mone_0.9b"))
    assert directives(text)[:6] == [
        "--job-name=mone_0.9b",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=24:00:00",
        f"--chdir={REPOSITORY}",
    ]
    assert {"--requeue", "--signal=USR1@300", "--open-mode=append"} <= set(directives(text))
    # It was asked for GPUs, so it must not train without.
    assert overrides(text) == [
        "device=cuda",
        "experiment=mone_0.9b",
        f"run.dir={REPOSITORY}/runs/mone_0.9b",
    ]
    # That one saves and resumes by itself.
    small = overrides(job(TINY))
    assert small[2:4] == ["checkpoint.interval=500", "checkpoint.resume=auto"]
    assert not (REPOSITORY / "runs" / "mone_0.9b" / "logs").exists()


def test_overrides_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "where 'it' is"
    folder.mkdir()
    given = [
        TINY,
        "run.name=\"a 'b' [c] $HOME * `e`; #\"",
        "data.split=[0.9, 0.1, 0]",
        "checkpoint.interval=7",
        "checkpoint.resume=auto",
        "device.kind=cpu",
    ]
    text = job(*given, cwd=folder)
    assert overrides(text)[:-1] == given
    assert f'--chdir="{folder}"' in directives(text)
    assert "--job-name=a_b_c_HOME_e" in directives(text)


def test_a_site_file_says_what_differs_between_clusters(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(
        "SITE_PARTITION=gpu SITE_ACCOUNT=project SITE_QOS=high\n"
        "SITE_GPU_REQUEST='--gres=gpu:h100:{n}'\nSITE_CPUS_PER_TASK=12\n"
        "SITE_SBATCH=(--exclusive '--comment=two words')\n"
        "SITE_MODULES=(cuda/12.6)\nSITE_SETUP='ulimit -l unlimited'\n"
        "SITE_ENVIRONMENT=('NCCL_SOCKET_IFNAME=ib0' 'A=b c')\nSITE_HEAD_SUFFIX=-ib0\n"
        "SITE_SRUN=(--mpi=none)\nSITE_OVERRIDES=(logging.wandb.mode=offline)\n",
        encoding="utf-8",
    )
    arguments = ("--gpus-per-node", "2", "--account", "mine", "--sbatch", "--nice=5", TINY)
    text = job("--site", str(site), *arguments)
    assert job(*arguments, site=str(site)) == text
    expected = ["--partition=gpu", "--account=mine", "--qos=high", "--gres=gpu:h100:2"]
    expected += ["--cpus-per-task=12", "--exclusive", "--comment=two words", "--nice=5"]
    assert not [line for line in expected if line not in directives(text)]
    settings = text.splitlines()
    for line in (
        "modules=( cuda/12.6 )",
        "setup=ulimit\\ -l\\ unlimited",
        "environment=( NCCL_SOCKET_IFNAME=ib0 A=b\\ c )",
        "head_suffix=-ib0",
        "srun_options=( --mpi=none )",
    ):
        assert line in settings
    assert overrides(text)[:3] == ["device=cuda", "logging.wandb.mode=offline", TINY]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_containers(kind: str, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(
        f"SITE_CONTAINER={kind}\nSITE_IMAGE=/images/a.img\nSITE_MOUNTS=(/data /x:/y)\n",
        encoding="utf-8",
    )
    text = job("--site", str(site), "--gpus-per-node", "1", TINY)
    run = REPOSITORY / "runs" / "tiny_mone"
    lines = [line for line in text.splitlines() if "/images/a.img" in line]
    assert len(lines) == 1
    words = shlex.split(lines[0].split("=(", 1)[1].rsplit(")", 1)[0])
    if kind == "pyxis":
        assert lines[0].startswith("srun_options=(")
        mounts = words[1].split("=", 1)[1].split(",")
        assert mounts[-3:] == [f"{run}:{run}", "/data:/data", "/x:/y"]
    else:
        assert lines[0].startswith("inside=(")
        assert words[:3] == ["apptainer", "exec", "--pwd"]
        assert "--nv" in words
        assert [words[at + 1] for at, word in enumerate(words) if word == "--bind"][-3:] == [
            str(run),
            "/data",
            "/x:/y",
        ]
        assert words[-1] == "/images/a.img"
    assert "python=python" in text.splitlines()


def test_a_sweep_is_an_array(tmp_path: Path) -> None:
    text = job(
        *("--sweep", "--max-parallel", "2", TINY, "logging.wandb.group=''"),
        "mone.keep_ratio=0.125,0.25,0.5",
        cwd=tmp_path,
    )
    folder = tmp_path / "runs" / "sweeps" / "tiny_mone"
    assert "--array=0-2%2" in directives(text)
    assert f"--output={folder}/logs/slurm-%A_%a.log" in directives(text)
    for task, ratio in enumerate(("0.125", "0.25", "0.5")):
        assert overrides(text, task)[-3:] == [
            f"run.dir={folder}/keep_ratio_{ratio}",
            f"run.name=tiny_mone-keep_ratio_{ratio}",
            "logging.wandb.group=tiny_mone",
        ]


def test_a_shipped_ablation(tmp_path: Path) -> None:
    text = job("--sweep", TINY, "ablation=score", cwd=tmp_path)
    folder = tmp_path / "runs" / "ablations" / "tiny_mone" / "score"
    assert "--array=0-3" in directives(text)
    assert overrides(text, 1)[-2:] == [
        f"run.dir={folder}/score_abs_gate",
        "run.name=tiny_mone-score_abs_gate",
    ]


def test_a_sweep_with_names_and_folders_of_ones_own(tmp_path: Path) -> None:
    text = job(
        *("--sweep", "experiment=tiny_moe,tiny_mone", "train.seed=1,2"),
        *("run.name=${model.num_layers}-${train.seed}-${mone.enabled}", "run.dir=out/${run.name}"),
        cwd=tmp_path,
    )
    assert "run.name=${model.num_layers}-${train.seed}-${mone.enabled}" in overrides(text, 3)
    assert f"run.dir={tmp_path}/out/4-2-True" in overrides(text, 3)
    assert f"--output={tmp_path}/out/logs/slurm-%A_%a.log" in directives(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to run"),
        (["--nodes", "0", TINY], "--nodes: '0' is not a whole number of 1 or more"),
        (["--nodes"], "--nodes: a value is missing"),
        (["--gpus", "8", TINY], "--gpus: unknown option"),
        ([TINY, "--nodes", "2"], "--nodes: options of the launcher stand before the overrides"),
        (["--time", "a day", TINY], "--time: 'a day' is not a limit"),
        (["--time", "5", "--grace", "300", TINY], "--grace: 300 s are no less than --time=5"),
        (["--tasks-per-node", "2", "--gpus-per-node", "2", TINY], "--tasks-per-node: for CPU jobs"),
        (["--sbatch", "exclusive", TINY], "'exclusive' is not an option of sbatch"),
        (["--max-parallel", "2", TINY], "--max-parallel: for sweeps"),
        (["--sweep", TINY], "--sweep: no key has several values"),
        (["--sweep", TINY, "ablation=score,shared"], "ablation: ablation=score,shared: one at a"),
        (["-m", TINY, "train.seed=1,2"], "-m: is --sweep here"),
        (["--sweep", TINY, "train.seed=range(1,"], "train.seed: cannot read"),
        (
            ["--sweep", TINY, "train.seed=interval(1,5)"],
            "train.seed: interval(1,5) is not a list of values",
        ),
        ([TINY, "train.seed=1,2"], "train.seed: several values need --sweep"),
        ([TINY, "train.stepz=1"], "train.stepz: unknown key; did you mean train.steps"),
        # A bad layout: found here, not after hours in a queue.
        (["--nodes", "3", TINY], "train.global_batch_size: 8 is not a multiple"),
        (["--nodes", "2", TINY, "parallel.expert=4"], "parallel.expert: world size 2"),
        (
            [TINY, "checkpoint.interval=0"],
            "checkpoint.interval: 0, and a job that is started again",
        ),
        ([TINY, "run.dir='100% b'"], "run.dir: "),
        ([TINY, "device=cuda"], "device.kind: cuda"),
        (["--site", "nowhere.env", TINY], "nowhere.env is no file that can be read"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(arguments: Sequence[str], told: str) -> None:
    assert told in refusal(*arguments)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("SITE_ACOUNT=a", "SITE_ACOUNT: unknown"),
        ("SITE_SBATCH=(", "not valid bash"),
        ("SITE_IMAGE=$NO_SUCH_VARIABLE/x", "NO_SUCH_VARIABLE: unbound variable"),
        ("false", "a line fails"),
        ("SITE_SBATCH=(exclusive)", "SITE_SBATCH: 'exclusive' is not an option of sbatch"),
        ("SITE_ENVIRONMENT=(NCCL_DEBUG)", "SITE_ENVIRONMENT: 'NCCL_DEBUG' is not NAME=value"),
        ("SITE_MOUNTS=(data)", "SITE_MOUNTS: 'data' is not an absolute path"),
        ("SITE_GPU_REQUEST=--gres=gpu:4", "SITE_GPU_REQUEST: '--gres=gpu:4' is not empty or"),
        ("SITE_CPUS_PER_TASK=many", "SITE_CPUS_PER_TASK: 'many' is not a whole number"),
        ("SITE_VENV=/no/such/venv", "SITE_VENV: no /no/such/venv/bin/python"),
        ("SITE_CONTAINER=docker", "SITE_CONTAINER: 'docker' is neither pyxis nor apptainer"),
        ("SITE_CONTAINER=pyxis", "SITE_IMAGE: missing for SITE_CONTAINER=pyxis"),
        ("SITE_IMAGE=a.sqsh", "SITE_CONTAINER: missing for SITE_IMAGE"),
        ("SITE_IMAGE=a SITE_CONTAINER=pyxis SITE_VENV=/v", "SITE_VENV: not with SITE_CONTAINER"),
    ],
)
def test_a_bad_site_file_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(text + "\n", encoding="utf-8")
    said = refusal("--site", str(site), TINY)
    assert told in said
    assert "site.env" in said


def test_every_setting_of_a_site_is_in_the_example() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    names = script.split('site_names="', 1)[1].split('"', 1)[0].replace("\\\n", " ").split()
    example = (REPOSITORY / "launch" / "site.example.env").read_text(encoding="utf-8")
    assert len(names) == 18
    assert not [name for name in names if f"# {name}=" not in example]


def test_the_example_works_with_everything_in_it(tmp_path: Path) -> None:
    """Its lines without the #, one container or one environment."""
    example = (REPOSITORY / "launch" / "site.example.env").read_text(encoding="utf-8")
    lines = [
        line.removeprefix("# ")
        for line in example.splitlines()
        if line.startswith(("# SITE_", "#     --", "#     NCCL", "# )")) and "SITE_VENV" not in line
    ]
    site = tmp_path / "site.env"
    site.write_text("SCRATCH=/scratch\n" + "\n".join(lines) + "\n", encoding="utf-8")
    text = job("--site", str(site), "--gpus-per-node", "1", TINY)
    assert "--gres=gpu:h100:1" in directives(text)
    assert "environment=( NCCL_DEBUG=WARN NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 )" in text


def test_help_names_every_option() -> None:
    said = slurm("--help").stdout
    listed = SCRIPT.read_text(encoding="utf-8").split("known='", 1)[1].split("'", 1)[0].split()
    assert len(listed) == 17
    assert not [option for option in listed if option not in said]
