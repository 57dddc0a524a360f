"""Row 2: a save stopped or failing at each operation on the disk leaves the old state or the new.

The disk is a stand-in for :mod:`os` inside the one module that the store changes disks through. It
stops the process (a fork) or fails the operation at a chosen point. When the process is stopped,
what was written but not yet brought to disk (fsync) is lost, as after a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults_runs import attempt
from faults_table import Tally
from store_helpers import contents, holds, save, write

from mone_megatron.checkpoint import CheckpointStore, CheckpointWriteError, durable

Count = Callable[[int, str], contextlib.AbstractContextManager[Tally]]

STOPPED = 86
CHANGING = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def no_real_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for what the tests prepare: a checkpoint as small as here is hashed by one thread."""
    monkeypatch.setattr(durable, "os", FaultyDisk(-1, "none"))


class FaultyDisk:
    """:mod:`os`, counting what changes the disk, and giving up at one of the operations.

    Modes: ``stop before``, ``stop after`` (the process ends there), ``fail before``, ``fail after``
    (an OSError, the operation not done or done), ``half`` (a write cut in the middle, then the
    end of the process).
    """

    def __init__(self, at: int, mode: str) -> None:
        self.at = at
        self.mode = mode
        self.trace: list[str] = []
        self.written: dict[int, Path] = {}
        self.unsafe: set[Path] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGING:
            return real

        def operation(*args: Any, **kwargs: Any) -> Any:
            chosen = len(self.trace) == self.at
            self.trace.append(name)
            if chosen and self.mode == "stop before":
                self.stop()
            if chosen and self.mode == "fail before":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if chosen and self.mode == "half" and name == "write":
                args = (args[0], bytes(args[1])[: len(args[1]) // 2])
            # Bringing to disk is kept in the books here: the machine does not really go down.
            result = None if name == "fsync" else real(*args, **kwargs)
            self.note(name, args, result)
            if chosen and self.mode in ("stop after", "half"):
                self.stop()
            if chosen and self.mode == "fail after":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return result

        return operation

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self.written[result] = Path(args[0])
        elif name == "write":
            self.unsafe.add(self.written[args[0]])
        elif name == "fsync":
            self.unsafe.discard(self.written[args[0]])
        elif name in ("rename", "replace"):
            old, new = Path(args[0]), Path(args[1])
            for path in list(self.unsafe):
                if path == old or old in path.parents:
                    self.unsafe.discard(path)
                    self.unsafe.add(new / path.relative_to(old))

    def stop(self) -> None:
        for path in self.unsafe:
            if path.exists():
                os.truncate(path, path.stat().st_size // 2)
        os._exit(STOPPED)


@contextlib.contextmanager
def disk(faulty: FaultyDisk) -> Iterator[FaultyDisk]:
    original = durable.os
    durable.os = faulty  # type: ignore[assignment]
    try:
        yield faulty
    finally:
        durable.os = original


def saving(store: CheckpointStore, faulty: FaultyDisk, step: int, attempt: int) -> None:
    """A save, its files not brought to disk by those who wrote them, then retention."""
    with disk(faulty):
        partial = store.begin(step)
        files = contents(step, attempt)
        write(partial, files)
        faulty.unsafe |= {partial / name for name in files}
        store.commit(partial, {"step": step, "attempt": attempt})
        store.retain(last=2, every=0)


def prepare_nothing(store: CheckpointStore) -> None:
    store.folder.mkdir()


def prepare_two(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)


def prepare_same(store: CheckpointStore) -> None:
    save(store, 3)


def prepare_same_and_older(store: CheckpointStore) -> None:
    save(store, 2)
    save(store, 3)


# What is there before the save of step 3 (attempt 1), and the step of its newest checkpoint.
STATES: dict[str, tuple[Callable[[CheckpointStore], None], int | None]] = {
    "first save": (prepare_nothing, None),
    "one more, the oldest goes": (prepare_two, 2),
    "overwriting the only one": (prepare_same, 3),
    "overwriting, an older one beside": (prepare_same_and_older, 3),
}


def check_state(store: CheckpointStore, old: int | None) -> str:
    """``old`` or ``new``: what the newest checkpoint is, whole; nothing else is right."""
    newest = store.newest_verified()
    if newest is None:
        assert old is None
        return "old"
    if newest.step == 3 and holds(newest, 3, attempt=1):
        return "new"
    assert old is not None
    assert holds(newest, old)
    return "old"


def operations_of(make: Callable[[CheckpointStore], None], folder: Path) -> list[str]:
    store = CheckpointStore(folder)
    make(store)
    faulty = FaultyDisk(-1, "none")
    saving(store, faulty, 3, 1)
    assert not faulty.unsafe
    return faulty.trace


def restart(folder: Path, old: int | None, found: str) -> None:
    """The next process cleans up, finds the same, and can save."""
    logged: list[str] = []
    store = CheckpointStore(folder, log=logged.append)
    store.clean()
    assert check_state(store, old) == found
    allowed = {"step_00000001", "step_00000002", "step_00000003", "latest.json"}
    temporary = {name for name in os.listdir(folder) if name.startswith(".latest.json.tmp-")}
    assert set(os.listdir(folder)) - temporary <= allowed
    for checkpoint in store.checkpoints():
        assert not checkpoint.damage()
    save(store, 4)
    newest = store.newest_verified()
    assert newest is not None
    assert holds(newest, 4)


def stop_at(prepared: Path, old: int | None, at: int, mode: str, folder: Path) -> str:
    """A save that stops there, and the next start; what is found then."""
    shutil.copytree(prepared, folder)
    child = os.fork()
    if child == 0:
        # Whatever happens in the child, it must not go on as a second pytest.
        try:
            saving(CheckpointStore(folder), FaultyDisk(at, mode), 3, 1)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED
    found = check_state(CheckpointStore(folder, log=lambda _: None), old)
    restart(folder, old, found)
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("state", STATES)
def test_stopped_at_each_operation(state: str, tally: Count, tmp_path: Path) -> None:
    make, old = STATES[state]
    prepared = tmp_path / "prepared"
    make(CheckpointStore(prepared))
    trace = operations_of(make, tmp_path / "counted")
    assert len(trace) > 25
    outcomes = []
    with tally(2, "stopped before each operation, or in the middle of a write") as t:
        for at, name in enumerate(trace):
            # After one operation is before the next.
            modes = ["stop before"] + (["half"] if name == "write" else [])
            modes += ["stop after"] if at == len(trace) - 1 else []
            for mode in modes:
                folder = tmp_path / f"{at}-{mode.replace(' ', '-')}"
                with attempt(t, f"{state}: {mode} operation {at}, {name}"):
                    outcomes.append(stop_at(prepared, old, at, mode, folder))
    # Once new, it stays so.
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert set(outcomes) == {"old", "new"}


def fail_at(prepared: Path, old: int | None, at: int, mode: str, folder: Path) -> bool:
    """A save with an error there, and the next start; whether the save failed, too."""
    shutil.copytree(prepared, folder)
    logged: list[str] = []
    store = CheckpointStore(folder, log=logged.append)
    error = error_of_saving(store, FaultyDisk(at, mode))
    if error is not None:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
        # Nothing of the failed save stays.
        assert not [name for name in os.listdir(folder) if ".partial-" in name]
        # And the old one is under its own name, unless the new one is.
        assert old is None or (folder / f"step_{old:08d}").is_dir()
    else:
        # Only the removal of what is not needed any more may fail without an error.
        assert check_state(store, old) == "new"
        assert any("could not be removed" in line for line in logged)
    restart(folder, old, check_state(store, old))
    shutil.rmtree(folder)
    return error is not None


@pytest.mark.parametrize("state", STATES)
def test_failing_at_each_operation(state: str, tally: Count, tmp_path: Path) -> None:
    make, old = STATES[state]
    prepared = tmp_path / "prepared"
    make(CheckpointStore(prepared))
    trace = operations_of(make, tmp_path / "counted")
    raised = 0
    with tally(2, "an error instead of each operation, or after it") as t:
        for at, name in enumerate(trace):
            for mode in ("fail before", "fail after"):
                folder = tmp_path / f"{at}-{mode.replace(' ', '-')}"
                with attempt(t, f"{state}: {mode} operation {at}, {name}"):
                    raised += fail_at(prepared, old, at, mode, folder)
    assert raised > len(trace)


def error_of_saving(store: CheckpointStore, faulty: FaultyDisk) -> CheckpointWriteError | None:
    try:
        saving(store, faulty, 3, 1)
    except CheckpointWriteError as error:
        return error
    return None


def test_order_of_operations(tmp_path: Path) -> None:
    trace = operations_of(prepare_same, tmp_path / "store")
    renames = [number for number, name in enumerate(trace) if name in ("rename", "replace")]
    # Old aside, new into place, tracker: the folder is brought to disk after each.
    assert [trace[number] for number in renames] == ["rename", "rename", "replace"]
    for number in renames:
        assert trace[number + 1 : number + 3] == ["open", "fsync"]
    # Nothing is removed before the tracker names the new one.
    assert not {"unlink", "rmdir"} & set(trace[: renames[2]])


def test_damaged_before_and_killed_between_the_renames(tmp_path: Path) -> None:
    """The checkpoint that was set aside is read where it is, and put back at the next start."""
    folder = tmp_path / "store"
    store = CheckpointStore(folder, log=lambda _: None)
    save(store, 3)
    aside = folder / ".step_00000003.replaced-another.host-1-00000000"
    (folder / "step_00000003").rename(aside)
    newest = store.newest_verified()
    assert newest is not None
    assert newest.path == aside
    assert holds(newest, 3)
    # Perhaps the other machine is still at it.
    store.clean()
    assert aside.exists()
    store.clean(grace_seconds=-1)
    assert not aside.exists()
    newest = store.newest_verified()
    assert newest is not None
    assert newest.path == folder / "step_00000003"
