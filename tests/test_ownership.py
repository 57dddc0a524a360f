"""Who owns a folder: real processes, killed ones, forked ones, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from mone_megatron import ownership
from mone_megatron.ownership import (
    OWNER_FILE,
    await_owner,
    live_owner,
    locked,
    owned_file,
    owned_folder,
    owned_path,
)

# Owns, says so, forks a child that sleeps on (argument 2), and waits to be told to let go.
_OWNER = """
import os, sys, time
from pathlib import Path
from mone_megatron.ownership import owned_folder
with owned_folder("run.dir", Path(sys.argv[1]), job=sys.argv[3], allocation=sys.argv[4]):
    child = 0
    if sys.argv[2] != "0":
        child = os.fork()
        if child == 0:
            time.sleep(float(sys.argv[2]))
            os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def _owner(
    folder: Path, *, child_seconds: float = 0, job: str = "", allocation: str = ""
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that owns ``folder``, and its forked child (0 for none)."""
    words = [str(folder), f"{child_seconds:g}", job, allocation]
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = 0
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
    finally:
        process.kill()
        if child:
            # First, since it holds the other end of the pipes.
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate()


def _refused(owning: AbstractContextManager[None]) -> str:
    with pytest.raises(ValueError, match=r"^(run\.dir|--output|--json): ") as raised, owning:
        pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


def _refusal(folder: Path) -> str:
    told = _refused(owned_folder("run.dir", folder))
    assert "in use" in told
    return told


def test_a_second_process_is_told_who_owns(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with _owner(folder) as (process, _):
        (folder / "kept").write_text("1")
        told = _refusal(folder)
        assert told.startswith(f"run.dir: {folder} is in use by process {process.pid} on ")
        assert os.uname().nodename in told
        assert "since 20" in told
        (tmp_path / "link").symlink_to(folder)
        assert str(process.pid) in _refusal(tmp_path / "link")
        # The folder beside it and the one inside it are others.
        for other in (tmp_path / "s", folder / "inside"):
            with owned_folder("run.dir", other):
                pass
    with owned_folder("run.dir", folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_killed_owner_keeps_nothing_though_its_child_lives(tmp_path: Path) -> None:
    with _owner(tmp_path, child_seconds=300) as (process, child):
        _refusal(tmp_path)
        process.kill()
        process.wait()
        os.kill(child, 0)
        with owned_folder("run.dir", tmp_path):
            assert live_owner(tmp_path) is not None


def test_a_child_that_ends_does_not_take_the_lock_along(tmp_path: Path) -> None:
    with _owner(tmp_path, child_seconds=0.01):
        time.sleep(0.2)
        _refusal(tmp_path)


def test_one_after_another_in_one_process_and_never_twice(tmp_path: Path) -> None:
    for _ in range(3):
        with owned_folder("run.dir", tmp_path / "a" / "b"), owned_folder("run.dir", tmp_path / "c"):
            assert str(os.getpid()) in _refusal(tmp_path / "a" / "b")
        # What was made for nothing is gone.
        assert list(tmp_path.iterdir()) == []


def test_an_error_inside_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), owned_folder("run.dir", tmp_path):
        raise KeyError
    assert live_owner(tmp_path) is None


def test_names_beside_prefixes_and_files(tmp_path: Path) -> None:
    prefix = tmp_path / "corpora" / "books"
    with owned_path("--output", prefix), owned_path("--output", tmp_path / "corpora" / "papers"):
        assert _refused(owned_path("--output", prefix)).startswith(f"--output: {prefix} is in use")
    with owned_file("--json", None):
        pass
    assert "directory" in _refused(owned_file("--json", tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/r", "x" * 300, "dangling"])
def test_what_cannot_be_a_folder_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    told = _refused(owned_folder("run.dir", tmp_path / name))
    assert told.startswith("run.dir: cannot use ")


def test_ranks_of_the_owner_s_job_go_on_and_others_are_refused(tmp_path: Path) -> None:
    await_owner("run.dir", tmp_path / "not_there", job="mine", patience=0)
    with _owner(tmp_path, job="mine") as (process, _):
        await_owner("run.dir", tmp_path, job="mine", patience=0)
        for job in ("another", ""):
            with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
                await_owner("run.dir", tmp_path, job=job, patience=0)
        process.kill()
        process.wait()
        # What a killed owner leaves says nothing.
        assert (tmp_path / OWNER_FILE).exists()
        await_owner("run.dir", tmp_path, job="another", patience=0)


def test_a_requeued_job_waits_for_its_earlier_life(tmp_path: Path) -> None:
    """Its host may be dead, and the server still hold its lock."""
    with _owner(tmp_path, allocation="77") as (process, _):
        record = json.loads((tmp_path / OWNER_FILE).read_text())
        (tmp_path / OWNER_FILE).write_text(json.dumps(record | {"host": "dead"}))
        begun = time.monotonic()
        assert "on dead" in _refused(owned_folder("run.dir", tmp_path, allocation="78"))
        ender = subprocess.Popen(["sh", "-c", f"sleep 4; kill -9 {process.pid}"])
        with owned_folder("run.dir", tmp_path, allocation="77"):
            assert time.monotonic() - begun > 2
        ender.wait()


def test_without_file_locks_it_says_so_once_and_the_owner_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(ownership, "_said_without_locks", False)
    with owned_folder("run.dir", tmp_path):
        _refusal(tmp_path)
    record = {"host": os.uname().nodename, "process": 2**22 + 1, "since": "then"}
    (tmp_path / OWNER_FILE).write_text(json.dumps(record))
    with owned_folder("run.dir", tmp_path):
        pass
    said = capsys.readouterr().err
    assert said.count("no file locks in") == 1


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    """By threads of several processes; one at a time has it."""
    script = """
import sys, time
from pathlib import Path
from mone_megatron.ownership import locked
count = Path(sys.argv[1], "count")
for _ in range(20):
    with locked(Path(sys.argv[1], "a.lock")):
        number = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(number + 1))
"""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"
    with locked(tmp_path / "a.lock"):
        pass
