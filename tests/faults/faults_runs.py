"""Runs to break, and ways to count what held; common to the tests of several rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults_table import Tally

from mone_megatron.testing.launch import REPOSITORY

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
TINY = ("experiment=tiny_mone", "device=cpu", *QUIET)
_MAINS = Path(__file__).with_name("many_mains.py")


@contextmanager
def attempt(tally: Tally, name: str) -> Iterator[None]:
    """Count the block as one try, which held when no assertion in it failed."""
    try:
        yield
    except AssertionError as error:
        tally.check(False, f"{name}: {error}")
    else:
        tally.check(True, "")


@dataclass(frozen=True)
class Ended:
    """How one command line ended."""

    code: int
    # What it wrote to stderr.
    said: str
    # Whether it got as far as opening a process group, and seconds until it ended; of
    # :func:`mains` only.
    opened: bool = False
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        """The lines for the user."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def assert_refused(self, *named: str) -> None:
        """One line that holds all of ``named``, exit code 2, no traceback."""
        assert self.code == 2, f"exit code {self.code}: {self.said[-2000:]}"
        assert "Traceback" not in self.said, self.said
        told = [line for line in self.errors if all(name in line for name in named)]
        assert told, f"no line names {named}: {self.said[-2000:]}"


def pretrain(
    *overrides: str, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> Ended:
    """One run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "mone_megatron.pretrain", *overrides],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    return Ended(result.returncode, result.stderr)


def mains(
    jobs: Mapping[str, Sequence[str]],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = 540,
) -> dict[str, Ended]:
    """Command lines one after another in one process: imports cost more than a tiny run.

    Args:
        jobs: name -> overrides.
        folder: for the lists and what they say.
        environment: added to this process's.
        timeout: seconds for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "mains.json"
    listed.write_text(json.dumps([list(overrides) for overrides in jobs.values()]))
    result = subprocess.run(
        [sys.executable, str(_MAINS), str(listed)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    ended = [Ended(**values) for values in json.loads((folder / "mains.ended.json").read_text())]
    return dict(zip(jobs, ended, strict=True))


def records(run: Path) -> list[dict[str, float | None]]:
    """``metrics.jsonl``."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def step_folder(run: Path, step: int) -> Path:
    """A run's checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"
