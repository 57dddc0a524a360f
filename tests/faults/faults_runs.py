"""Runs to break, and ways to count what held; common to the tests of several rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from faults_helpers import QUIET
from faults_table import Tally

from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python

TINY = ("experiment=tiny_mone", "device=cpu", *QUIET, "model.num_layers=2")
_MAINS = Path(__file__).with_name("many_mains.py")


@contextmanager
def attempt(tally: Tally, name: str) -> Iterator[None]:
    """Count the block as one try, which held when no assertion in it failed."""
    try:
        yield
    except AssertionError as error:
        # The table has little room, and a failed test shows the whole.
        tally.check(False, f"{name}: {str(error)[:300]}")
    else:
        tally.check(True, "")


@dataclass(frozen=True)
class Ended:
    """How one command line ended."""

    code: int
    # What it wrote to stderr.
    said: str
    # Of :func:`mains` only: whether it opened a process group, whether torch was imported by
    # then, and seconds until it ended.
    opened: bool = False
    torch: bool = True
    seconds: float = 0.0

    @property
    def errors(self) -> list[str]:
        """The lines for the user."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def assert_refused(self, *named: str, code: int = 2) -> None:
        """A line that holds all of ``named``, no traceback, and the exit code."""
        assert self.code == code, f"exit code {self.code}: {self.said[-2000:]}"
        assert "Traceback" not in self.said, self.said
        told = [line for line in self.errors if all(name in line for name in named)]
        assert told, f"no line names {named}: {self.said[-2000:]}"


@dataclass(frozen=True)
class Main:
    """One command line of :func:`mains`."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def pretrain(
    *overrides: str, environment: Mapping[str, str] | None = None, timeout: float = 500
) -> Ended:
    """One run in a process of its own."""
    result = run_python(
        ["-m", "mone_megatron.pretrain", *overrides],
        environment={"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        folder=REPOSITORY,
        timeout=timeout,
    )
    return Ended(result.returncode, result.stderr)


def mains(
    jobs: Mapping[str, Main], folder: Path, *, watch: bool = True, timeout: float = 1800
) -> dict[str, Ended]:
    """Command lines one after another in one process: imports cost more than a tiny run.

    Args:
        jobs: by name.
        folder: for the lists and what they say.
        watch: tell which opened a process group, in a process that has imported torch; without it
            tell whether torch was imported.
        timeout: seconds for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "mains.json"
    listed.write_text(json.dumps({"watch": watch, "jobs": [asdict(job) for job in jobs.values()]}))
    if watch:
        variables = {"OMP_NUM_THREADS": "1"}
        result = run_python(
            [str(_MAINS), str(listed)], environment=variables, folder=REPOSITORY, timeout=timeout
        )
    else:
        result = subprocess.run(
            [sys.executable, str(_MAINS), str(listed)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    assert result.returncode == 0, result.stderr[-4000:]
    ended = [Ended(**values) for values in json.loads((folder / "mains.ended.json").read_text())]
    return dict(zip(jobs, ended, strict=True))
