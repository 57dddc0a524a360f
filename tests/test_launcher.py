"""A run under torchrun ends as it does itself: its exit code, its last lines, no traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mone_megatron.rendezvous_errors import why_not_met
from mone_megatron.testing.launch import REPOSITORY, rank_variables, start_in_session
from mone_megatron.testing.warm_start import run_python

LAUNCHER = ("-m", "mone_megatron.launcher")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def launched(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Two ranks that do this, without torch."""
    script = folder / "rank.py"
    script.write_text(f"import os, sys\nrank = int(os.environ['RANK'])\n{code}\n", encoding="utf-8")
    arguments = [*LAUNCHER, "--standalone", "--nproc-per-node", "2", str(script)]
    return run_python(arguments, folder=REPOSITORY, timeout=300)


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("pass", 0, ""),
        ("sys.exit(7 if rank else 0)", 7, ""),
        (r"os.write(2, b'why\n'); sys.exit(75)", 75, "why\n"),
        (
            "rank and os.kill(os.getpid(), 9)",
            137,
            "error: rank 1 was killed by SIGKILL, which a machine that runs out of memory sends\n",
        ),
        ("rank or os.abort()", 134, "error: rank 0 was killed by SIGABRT\n"),
    ],
)
def test_the_run_has_the_last_word(tmp_path: Path, code: str, status: int, told: str) -> None:
    done = launched(tmp_path, code)
    assert done.returncode == status
    # The first rank that fails may end the other before it says so, too.
    assert done.stderr in {told, 2 * told}


def test_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        # torchrun passes on what the terminal has sent to all.
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        signal.signal(number, signal.SIG_IGN)\n"
        # Whole: print writes the end of a line by itself, and both ranks write to one pipe.
        "    os.write(1, b'saved\\n')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, end)\n"
        f"open({str(tmp_path)!r} + '/ready-' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    run = start_in_session(
        [sys.executable, *LAUNCHER, "--standalone", "--nproc-per-node", "2", str(script)]
    )
    until = time.monotonic() + 300
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < until:
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out, err) == (130, "saved\nsaved\n", "")


def test_a_port_that_is_taken_is_one_line(taken_port: int, tmp_path: Path) -> None:
    options = ("--nproc-per-node", "1", "--master-port", str(taken_port))
    (tmp_path / "rank.py").touch()
    done = run_python([*LAUNCHER, *options, str(tmp_path / "rank.py")], folder=REPOSITORY)
    told = f"error: port {taken_port}: another process has it; give torchrun a free one with"
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1


def test_a_rank_whose_port_is_taken_says_so_in_one_line(taken_port: int, tmp_path: Path) -> None:
    """Without torchrun's agent, as under srun."""
    run = ("experiment=tiny_mone", "device=cpu", "device.threads=1", f"run.dir={tmp_path / 'run'}")
    done = run_python(
        ["-m", "mone_megatron.pretrain", *run, "logging.wandb.mode=disabled"],
        environment=rank_variables(0, 1) | {"MASTER_PORT": str(taken_port)},
        folder=REPOSITORY,
    )
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told == [
        f"error: port {taken_port}: another process has it; give torchrun a free one with "
        "--master-port (MASTER_PORT without torchrun)"
    ]
    assert "Traceback" not in done.stderr


def test_other_reasons_are_told_as_they_are() -> None:
    told = why_not_met(ConnectionError("timed out after 60 s\nconnecting to (n1, 29500)"))
    assert "cannot meet (timed out after 60 s connecting to (n1, 29500)); look at --master" in told
    assert "\n" not in told
