"""Row 17: a disk that fills up at any point of a save: the file is named, earlier saves stay."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from faults_helpers import SMALL, losses, saved_steps, state_digest, step_folder
from faults_runs import Ended, attempt, pretrain
from faults_table import Tally

from mone_megatron.checkpoint import open_checkpoint
from mone_megatron.testing.launch import REPOSITORY
from mone_megatron.testing.warm_start import run_python

Count = Callable[[int, str], AbstractContextManager[Tally]]
FULL = "a disk that is full at another size each time: path and bytes told, saves before intact"
RUN = (*SMALL, "train.steps=4", "checkpoint.interval=2")


@contextmanager
def disk_of(size: int, folder: Path) -> Iterator[None]:
    """A file system of so many bytes at ``folder``."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    try:
        with disk_of(1 << 20, folder):
            return True
    except subprocess.CalledProcessError:
        return False


def run_with_file_limit(limit: int, *overrides: str) -> Ended:
    """The same where nobody may mount: no file may get larger than ``limit``."""
    code = (
        "import resource, sys; from mone_megatron.pretrain import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
        "sys.exit(main(sys.argv[2:]))"
    )
    result = run_python(
        ["-c", code, str(limit), *overrides],
        environment={"OMP_NUM_THREADS": "1"},
        folder=REPOSITORY,
    )
    return Ended(result.returncode, result.stderr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a disk that is large enough."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended = pretrain(*RUN, f"run.dir={run}")
    assert ended.code == 0, ended.said
    return run


def bytes_of(path: Path) -> int:
    """On a file system of pages, folders apart."""
    page = resource.getpagesize()
    sizes = [one.stat().st_size for one in path.rglob("*") if one.is_file()]
    return sum(-(-size // page) * page for size in sizes)


def assert_told(ended: Ended, run: Path) -> None:
    assert ended.code == 1, f"exit code {ended.code}: {ended.said[-1500:]}"
    assert "Traceback" not in ended.said, ended.said[-1500:]
    (line,) = ended.errors
    assert str(run / "checkpoints") in line, line
    assert "bytes free" in line, line


def assert_goes_on(run: Path, whole: Path, rest: tuple[str, ...]) -> None:
    """What was saved before is whole and can be taken up, where there is room."""
    assert saved_steps(run) == [2]
    open_checkpoint(step_folder(run, 2))
    assert state_digest(step_folder(run, 2)) == state_digest(step_folder(whole, 2))
    partial = [path.name for path in (run / "checkpoints").iterdir() if "partial" in path.name]
    assert not partial, partial
    elsewhere = run.parent.parent / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(run, elsewhere)
    ended = pretrain(*RUN, *rest, f"run.dir={elsewhere}", "checkpoint.resume=auto")
    assert ended.code == 0, ended.said
    assert losses(elsewhere) == losses(whole)
    assert state_digest(step_folder(elsewhere, 4)) == state_digest(step_folder(whole, 4))


def test_disks_that_fill_up(tmp_path: Path, whole: Path, tally: Count, full: bool) -> None:
    checkpoint = bytes_of(step_folder(whole, 2))
    others = bytes_of(whole) - bytes_of(whole / "checkpoints")
    # From next to nothing for the second save to nearly all of it (64 KiB more are for folders).
    shares = [0.02 + 0.09 * number for number in range(10)] if full else [0.25, 0.75]
    mounts = can_mount(tmp_path / "probe")
    largest = max(path.stat().st_size for path in step_folder(whole, 2).iterdir())
    with tally(17, FULL) as t:
        for number, share in enumerate(shares):
            asynchronous = ("checkpoint.async_save=true",) if number % 2 else ()
            name = f"{share:.0%} of a save, {'async' if asynchronous else 'sync'}"
            disk = tmp_path / str(number)
            run = disk / "run"
            overrides = (*RUN, *asynchronous, f"run.dir={run}")
            with attempt(t, name):
                if mounts:
                    size = int(others + checkpoint * (1 + share)) + 64 * 1024
                    with disk_of(size, disk):
                        ended = pretrain(*overrides)
                        assert_told(ended, run)
                        assert_goes_on(run, whole, asynchronous)
                else:
                    resume = f"checkpoint.resume={step_folder(whole, 2)}"
                    ended = run_with_file_limit(int(largest * share), *overrides, resume)
                    assert_told(ended, run)
                    assert saved_steps(run) == []
                    open_checkpoint(step_folder(whole, 2))
        t.note = "tmpfs" if mounts else "RLIMIT_FSIZE"


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, tally: Count, full: bool) -> None:
    if not full:
        pytest.skip("with --faults-full")
    if not can_mount(tmp_path / "probe"):
        pytest.skip("needs to mount a file system")
    disk = tmp_path / "disk"
    with disk_of(128 * 1024, disk), tally(17, "no room for the first save") as t:
        ended = pretrain(*RUN, f"run.dir={disk / 'run'}")
        with attempt(t, "128 KiB"):
            assert_told(ended, disk / "run")
            assert saved_steps(disk / "run") == []
            assert json.loads((disk / "run" / "run.json").read_text())["status"] == "failed"
