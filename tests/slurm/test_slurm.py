"""launch/slurm.sh on a real SLURM: what it submits runs, is requeued, and loses nothing.

The slow ones: make slurm-test.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, wait_until

from mone_megatron.testing.launch import REPOSITORY, run_layouts

# tiny_mone made smaller still, for runs of many steps.
MODEL = (
    "experiment=tiny_mone",
    "device=cpu",
    "device.threads=1",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.dense_ffn_hidden_size=32",
    "model.num_experts=4",
    "model.expert_ffn_hidden_size=32",
    "train.seq_length=16",
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
)
# Enough that a run is still going when a signal that was sent after its first step arrives.
SHORT, LONG = 150, 600
ENDLESS = 100_000
# A save only when asked to.
SAVING = ("checkpoint.interval=1000000",)


def losses(run: Path) -> dict[int, str]:
    """Step -> its loss, to the last bit."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {int(record["step"]): float(record["loss"]).hex() for record in records}


def saved_step(run: Path) -> int:
    tracker = run / "checkpoints" / "latest.json"
    return int(json.loads(tracker.read_text())["step"]) if tracker.exists() else 0


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text(encoding="utf-8"))["status"])


def output(run: Path) -> str:
    """What the job's own script said."""
    return "".join(path.read_text() for path in sorted(run.glob("logs/slurm-*[0-9].log")))


def wait_for_requeue(cluster: Cluster, job: str, restarts: int) -> None:
    """Until the job is in the queue for the so many-th time."""

    def queued() -> bool:
        facts = cluster.facts(job)
        return int(facts["Restarts"]) == restarts and facts["JobState"] == "PENDING"

    wait_until(queued, f"requeue {restarts}", cluster.told)
    cluster.hurry(job)


def wait_for_new_step(cluster: Cluster, job: str, run: Path, restarts: int) -> None:
    """Until this start of the job trained beyond what it went on from."""

    def trained() -> bool:
        facts = cluster.facts(job)
        assert facts["JobState"] not in ("COMPLETED", "FAILED"), cluster.told()
        return int(facts["Restarts"]) == restarts and max(losses(run), default=0) > saved_step(run)

    wait_until(trained, f"a step of start {restarts + 1}", cluster.told)


@pytest.fixture(scope="session")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes without SLURM, uninterrupted."""
    folder = tmp_path_factory.mktemp("direct")
    run_layouts({"run": (*MODEL, f"train.steps={SHORT}")}, processes=2, folder=folder)
    return folder / "run"


def test_two_nodes_from_one_command(cluster: Cluster, direct: Path) -> None:
    run = cluster.folder / "jobs" / "two nodes"
    name = "a 'b' c"
    job = cluster.submit(
        *("--nodes", "2", "--time", "1:00:00", *MODEL, *SAVING, f"train.steps={SHORT}"),
        *(f'run.name="{name}"', f'run.dir="{run}"'),
    )
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["NumNodes"]) == ("COMPLETED", "2"), cluster.told()
    assert losses(run) == losses(direct)
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (config["name"], config["world_size"], config["status"]) == (name, 2, "completed")
    # One log of the job, one of each process; what rank 0 says is in its own.
    logs = sorted(path.name for path in (run / "logs").glob(f"slurm-{job}*.log"))
    assert logs == [f"slurm-{job}-rank-0.log", f"slurm-{job}-rank-1.log", f"slurm-{job}.log"]
    assert "2 processes" in (run / "logs" / f"slurm-{job}-rank-0.log").read_text()
    assert "ended with 0" in output(run)


def signal_and_requeue(cluster: Cluster, run: Path, links: int, steps: int) -> None:
    job = cluster.submit(
        *("--nodes", "2", "--time", "5:00:00", *MODEL, *SAVING),
        *(f"train.steps={steps}", f"run.dir={run}"),
    )
    saved = []
    for link in range(links):
        wait_for_new_step(cluster, job, run, link)
        # What --signal does, to the processes of all steps.
        cluster.ask("scancel", "--signal=USR1", job)
        wait_for_requeue(cluster, job, link + 1)
        assert status(run) == "interrupted"
        saved.append(saved_step(run))
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], int(facts["Restarts"])) == ("COMPLETED", links), cluster.told()
    assert output(run).count("ended with 75") == links
    # Each start took up what the one before it left; none trained from the beginning.
    said = (run / "logs" / f"slurm-{job}-rank-0.log").read_text(encoding="utf-8")
    resumed = [int(step) for step in re.findall(r"^resumed from .* after step (\d+)$", said, re.M)]
    assert resumed == saved
    assert saved == sorted(set(saved))
    assert status(run) == "completed"


def test_chain_of_two_requeues(cluster: Cluster, direct: Path) -> None:
    run = cluster.folder / "jobs" / "chain"
    signal_and_requeue(cluster, run, links=2, steps=SHORT)
    assert losses(run) == losses(direct)


@pytest.mark.slow
def test_chain_of_ten_requeues(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.folder / "jobs" / "long-chain"
    signal_and_requeue(cluster, run, links=10, steps=LONG)
    run_layouts({"run": (*MODEL, f"train.steps={LONG}")}, processes=2, folder=tmp_path)
    assert losses(run) == losses(tmp_path / "run")


@pytest.mark.slow
def test_time_limit_then_scancel_then_again(cluster: Cluster) -> None:
    """Each of them leaves a run that goes on where it was, without a step lost or twice."""
    run = cluster.folder / "jobs" / "limits"
    command = ("--nodes", "2", "--time", "3", "--grace", "60", *MODEL, *SAVING)
    command = (*command, f"train.steps={ENDLESS}", f"run.dir={run}")
    job = cluster.submit(*command)
    # SLURM signals up to a minute early; nobody else signals here.
    wait_for_requeue(cluster, job, 1)
    wait_for_new_step(cluster, job, run, 1)
    assert "ended with 75" in output(run)
    first = saved_step(run)
    assert first > 0

    cluster.ask("scancel", job)
    assert cluster.wait_for_end(job)["JobState"] == "CANCELLED"
    wait_until(lambda: saved_step(run) > first, "a save after scancel", cluster.told)
    wait_until(lambda: status(run) == "interrupted", "run.json after scancel", cluster.told)
    second = saved_step(run)

    again = cluster.submit(*command)
    wait_for_new_step(cluster, again, run, 0)
    assert f"from step {second}" in output(run)
    cluster.ask("scancel", again)
    cluster.wait_for_end(again)
    done = list(losses(run))
    assert done == list(range(1, len(done) + 1))


@pytest.mark.slow
def test_killed_slurmd(cluster: Cluster, direct: Path) -> None:
    """SLURM takes the node for dead, requeues the job, and the run loses nothing."""
    run = cluster.folder / "jobs" / "node"
    job = cluster.submit(
        *("--nodes", "2", "--time", "1:00:00", *MODEL, "checkpoint.interval=20"),
        *(f"train.steps={ENDLESS}", f"run.dir={run}"),
    )
    wait_until(lambda: saved_step(run) >= 20, "a checkpoint", cluster.told)
    cluster.kill_node("n2")
    try:
        wait_for_requeue(cluster, job, 1)
    finally:
        cluster.start_node("n2")
    before = saved_step(run)
    wait_until(lambda: saved_step(run) > before, "a checkpoint of start 2", cluster.told)
    cluster.ask("scancel", job)
    cluster.wait_for_end(job)
    done = list(losses(run))
    assert done == list(range(1, len(done) + 1))


@pytest.mark.slow
def test_killed_process(cluster: Cluster) -> None:
    """A process that is gone ends the job's start, not the job."""
    run = cluster.folder / "jobs" / "killed"
    job = cluster.submit(
        *("--nodes", "2", *MODEL, "checkpoint.interval=20", f"train.steps={ENDLESS}"),
        f"run.dir={run}",
    )
    wait_until(lambda: saved_step(run) >= 20, "a checkpoint", cluster.told)
    # To the processes of one node.
    cluster.kill_tasks("n2")
    wait_for_requeue(cluster, job, 1)
    wait_for_new_step(cluster, job, run, 1)
    cluster.ask("scancel", job)
    cluster.wait_for_end(job)
    done = list(losses(run))
    assert done == list(range(1, len(done) + 1))


@pytest.mark.slow
def test_no_endless_requeues(cluster: Cluster) -> None:
    """A run that never comes to a checkpoint is given up."""
    run = cluster.folder / "jobs" / "stalls"
    job = cluster.submit(
        *("--max-stalls", "2", *MODEL, *SAVING, f"train.steps={ENDLESS}", f"run.dir={run}")
    )
    log = run / "logs" / f"slurm-{job}-rank-0.log"
    for start in range(2):
        wait_until(log.exists, f"start {start + 1}", cluster.told)
        # Python is still importing: the signal ends it.
        cluster.ask("scancel", "--signal=USR1", job)
        ended = f"start {start + 1} has ended"
        wait_until(lambda n=start: output(run).count("ended with 138") > n, ended, cluster.told)
        log.unlink()
        if start == 0:
            wait_for_requeue(cluster, job, 1)
    facts = cluster.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1"), cluster.told()
    assert "no checkpoint after step 0 in the last 2 starts" in output(run)


@pytest.mark.slow
def test_sweep_is_an_array(cluster: Cluster) -> None:
    sweep = cluster.folder / "jobs" / "sweep"
    job = cluster.submit(
        *("--sweep", "--max-parallel", "2", *MODEL, "train.steps=4"),
        *("mone.keep_ratio=0.125,0.25,0.5", f"run.dir={sweep}"),
    )
    for task in range(3):
        assert cluster.wait_for_end(f"{job}_{task}")["JobState"] == "COMPLETED", cluster.told()
    runs = sorted(sweep.glob("*_*"))
    assert [path.name for path in runs] == [
        f"keep_ratio_{ratio}" for ratio in ("0.125", "0.25", "0.5")
    ]
    assert [len(losses(path)) for path in runs] == [4, 4, 4]
    assert len({tuple(losses(path).values()) for path in runs}) == 3
    command = [sys.executable, "tools/compare_runs.py", *map(str, runs), "--output", str(sweep)]
    compared = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout + compared.stderr
