"""Row 18: a W&B server that refuses, fails or stalls, at any moment: training never notices."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import pytest
import wandb
from fake_wandb import Break, FakeWandb, fake_wandb
from faults_helpers import SMALL, records, steps
from faults_runs import attempt, pretrain
from faults_table import Tally

from mone_megatron.config.load import compose
from mone_megatron.train.hooks.wandb_run import WandbHook

Count = Callable[[int, str], AbstractContextManager[Tally]]
OUTAGE = "W&B refuses, answers 500 or stalls at start, mid-run or end: all losses kept offline"
STEPS = 5
# Seconds the client waits for its server. Far more than the steps take even on a loaded machine:
# the order of the lines then tells who waited for whom.
PATIENCE = 25
Moment = Literal["start", "mid-run", "end"]


def break_at(fake: FakeWandb, moment: Moment, kind: Break, run: Path) -> None:
    """Have the server break down then."""

    def after_it_made_the_run(path: str) -> Break | None:
        return kind if fake.made_run else None

    def after_the_last_step(path: str) -> Break | None:
        return kind if len(records(run)) == STEPS else None

    if moment == "start":
        fake.break_down(kind)
    else:
        fake.break_now = after_it_made_the_run if moment == "mid-run" else after_the_last_step


def recovered(folder: Path) -> dict[int, float]:
    """Step -> loss that another server gets from ``wandb sync``."""
    runs = [str(path) for path in folder.glob("*run-*") if path.is_dir() and not path.is_symlink()]
    with fake_wandb() as fake:
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--include-online", *runs],
            cwd=folder,  # it writes a log there
            env=os.environ | credentials(fake),
            check=True,
            capture_output=True,
            timeout=300,
        )
    return {line["step"]: line["loss"] for line in fake.history}


def credentials(fake: FakeWandb) -> dict[str, str]:
    return {
        "WANDB_BASE_URL": fake.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_ERROR_REPORTING": "false",
    }


@contextmanager
def outer_service() -> Iterator[None]:
    """A W&B service of this process, which those it starts find in their environment."""
    wandb.setup()
    assert wandb.env.SERVICE in os.environ
    try:
        yield
    finally:
        wandb.teardown()


# The one that tells who waited for whom.
SHORT: tuple[Moment, Break] = ("start", "stalls")


@pytest.mark.parametrize("kind", get_args(Break))
@pytest.mark.parametrize("moment", get_args(Moment))
def test_an_outage_neither_stops_nor_delays_training(
    tmp_path: Path, tally: Count, full: bool, moment: Moment, kind: Break
) -> None:
    if not full and (moment, kind) != SHORT:
        pytest.skip("with --faults-full")
    run = tmp_path / "run"
    with fake_wandb() as fake, outer_service():
        break_at(fake, moment, kind, run)
        ended = pretrain(
            *SMALL,
            f"train.steps={STEPS}",
            "logging.progress=lines",
            "logging.wandb.mode=online",
            f"logging.wandb.timeout_seconds={PATIENCE}",
            f"run.dir={run}",
            environment=credentials(fake),
        )
    with tally(18, OUTAGE) as t, attempt(t, f"{kind} at {moment}"):
        assert ended.code == 0, ended.said
        assert fake.broken == kind, "it was not asked anything then"
        assert fake.made_run == (moment != "start")
        assert steps(run) == list(range(1, STEPS + 1))
        assert json.loads((run / "run.json").read_text())["status"] == "completed"
        # A stalled server is given up long after the last step: no step waited for it.
        if (moment, kind) == ("start", "stalls"):
            last = ended.said.index(f"step {STEPS}/{STEPS}")
            assert last < ended.said.index("WARNING: W&B")
        assert ended.said.count("WARNING: W&B") <= 1, ended.said
        assert wandb.env.SERVICE not in os.environ
        assert recovered(run / "wandb") == {
            int(record["step"]): record["loss"] for record in records(run)
        }


def test_a_server_that_works_gets_everything(tmp_path: Path, full: bool) -> None:
    """Or the ones above would not break anything."""
    if not full:
        pytest.skip("with --faults-full")
    run = tmp_path / "run"
    with fake_wandb() as fake:
        ended = pretrain(
            *SMALL,
            f"train.steps={STEPS}",
            "logging.wandb.mode=online",
            f"logging.wandb.timeout_seconds={4 * PATIENCE}",
            f"run.dir={run}",
            environment=credentials(fake),
        )
    assert ended.code == 0, ended.said
    assert "WARNING" not in ended.said, ended.said
    expected = {int(record["step"]): record["loss"] for record in records(run)}
    assert {line["step"]: line["loss"] for line in fake.history} == expected
    assert recovered(run / "wandb") == expected


def test_a_resumed_run_goes_on_with_the_same_wandb_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    online = (
        *SMALL,
        f"train.steps={STEPS}",
        "checkpoint.interval=1",
        "checkpoint.resume=auto",
        "logging.wandb.mode=online",
        f"logging.wandb.timeout_seconds={4 * PATIENCE}",
        "logging.wandb.tags=[a,b]",
        "logging.wandb.group=g",
        f"run.dir={run}",
    )
    with fake_wandb() as fake:
        first = pretrain(*online, "train.exit_after_minutes=0.0001", environment=credentials(fake))
        assert first.code == 75, first.said
        seen = len(fake.runs)
        second = pretrain(*online, environment=credentials(fake))
        assert second.code == 0, second.said
    assert "WARNING: W&B" not in first.said + second.said
    assert len(fake.runs) > seen
    assert {one["name"] for one in fake.runs} == {json.loads((run / "run.json").read_text())["id"]}
    assert {one["groupName"] for one in fake.runs} >= {"g"}
    assert all(one["groupName"] in ("g", None) for one in fake.runs)
    assert [one["tags"] for one in fake.runs if one["groupName"]] == [["a", "b"]] * 2
    assert [line["step"] for line in fake.history] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in fake.history] == [one["loss"] for one in records(run)]


class StubRun:
    """A W&B run whose client hangs or fails."""

    def __init__(self, stuck: threading.Event | None) -> None:
        self.stuck = stuck

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, values: dict[str, float]) -> None:
        if self.stuck is None:
            raise RuntimeError("connection\nlost")
        self.stuck.wait()

    def finish(self, exit_code: int) -> None: ...


@pytest.mark.parametrize("hangs", [True, False])
def test_a_client_that_hangs_or_fails_mid_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    stuck = threading.Event()
    stub = SimpleNamespace(
        init=lambda **options: StubRun(stuck if hangs else None),
        Settings=lambda **options: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # Nothing is waited for but the thread of one that fails, which is soon over.
    limit = 0.2 if hangs else 60.0
    config = compose(["experiment=tiny_mone", f"logging.wandb.timeout_seconds={limit}"])
    stream = io.StringIO()
    hook = WandbHook(config, tmp_path, "id", stream=stream)
    hook.on_start()
    started = time.monotonic()
    # With a wait each they would take minutes.
    for step in range(1, 1001):
        hook.on_step({"step": step, "loss": 1.0})
    hook.on_end("completed")
    assert time.monotonic() - started < 60.0
    stuck.set()
    assert stream.getvalue().count("WARNING: W&B") == 1
    assert ("does not end" if hangs else "connection lost") in stream.getvalue()
