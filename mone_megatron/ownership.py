"""Lets one process at a time write into a folder, and says who owns it to a second one.

Ownership is a lock (``flock``) on a small file that also says who holds it. The kernel takes it
back from an owner that ends, however it ends. Forked children close their copy at once, so neither
a checkpoint writer nor a loader worker keeps what its killed parent held, and ``flock`` stays with
the parent when they do. On file systems without locks, the file alone tells, on one host.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from mone_megatron.os_errors import unusable

# The lock of a folder, in it. Beside other outputs lies a hidden file that ends like this.
OWNER_FILE = ".owner"
# What file systems that have no locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# An owner that is just ending: nobody is refused for that.
_ENDING_SECONDS = 1.0
# A server may hold the locks of a host that died, until its lease ends.
_LEASE_SECONDS = 120.0
# After which someone who waits says so.
_SILENT_SECONDS = 5.0
_POLL_SECONDS = 0.1
_RECORD_BYTES = 4096

# Descriptors of the locks that this process holds or tries for.
_held: set[int] = set()
_said_without_locks = False


def _let_go_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@dataclass(frozen=True)
class Owner:
    """Describes who holds a lock, as its file says.

    Attributes:
        host: the machine of the process that holds it.
        process: the id of that process on its machine.
        since: when it was taken, UTC, ISO 8601.
        started: when the process began, in the kernel's ticks; 0 where that is not known.
        job: what all processes that were launched together share; empty for a single one.
        allocation: the scheduler's id of its job, which a requeued job keeps; empty without.
    """

    host: str
    process: int
    since: str
    started: int = 0
    job: str = ""
    allocation: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    @property
    def is_seen_alive(self) -> bool:
        """Returns whether it runs on this machine; False also where that cannot be seen."""
        if self.host != platform.node():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's
            pass
        return _started(self.process) == self.started


@contextmanager
def owned_folder(
    key: str, folder: Path, *, what: str = "", job: str = "", allocation: str = ""
) -> Iterator[None]:
    """Owns ``folder``, which is made when it is not there, for as long as the block runs.

    A folder that this made goes again when the block left nothing in it.

    Args:
        key: the configuration key or the option that names the folder, for messages.
        folder: a link to a folder is that folder.
        what: to be told beside the owner: what the folder is for.
        job: what all processes that were launched together share.
        allocation: the scheduler's id of this job. The owner's of the same id, unless it runs on
            this machine, is an earlier life of this job, and is waited for.

    Raises:
        ValueError: another process owns the folder (its host, process and time are named), or
            nothing can be written there.
    """
    lock = _Lock(folder / OWNER_FILE, job=job, allocation=allocation)
    with _owned(key, folder, lock, what):
        yield


@contextmanager
def owned_path(key: str, path: Path, *, what: str = "") -> Iterator[None]:
    """Owns the name ``path`` for as long as the block runs, by a hidden file beside it.

    For a file, a folder that appears whole, or a prefix. Its parent is made when it is not there.

    Raises:
        ValueError: as :func:`owned_folder`; ``path`` cannot be a name.
    """
    if path.name in ("", ".."):
        raise ValueError(f"{key}: {str(path)!r} is no name; end it with one")
    with _owned(key, path, _Lock(path.with_name(f".{path.name}{OWNER_FILE}")), what):
        yield


@contextmanager
def owned_file(key: str, path: Path | None) -> Iterator[None]:
    """Owns a result file that is written at the end, checked before time is spent on it.

    Args:
        key: the option that names it.
        path: None for no file, which is nothing to own.

    Raises:
        ValueError: as :func:`owned_path`; ``path`` is a folder, or a file that cannot be written.
    """
    # A device or a pipe takes what comes.
    if path is None or (_exists(path) and not (path.is_file() or path.is_dir())):
        yield
        return
    with owned_path(key, path):
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise unusable(key, path, error) from None
        yield


@contextmanager
def _owned(key: str, path: Path, lock: _Lock, what: str) -> Iterator[None]:
    made: list[Path] = []
    place = lock.path.parent
    try:
        for missing in reversed([place, *place.parents]):
            if not missing.exists():
                missing.mkdir(exist_ok=True)
                made.append(missing)
        taken = lock.take()
        if taken and not os.access(place, os.W_OK):
            lock.release()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    except OSError as error:
        _remove_empty(made)
        raise unusable(key, path, error) from None
    if not taken:
        raise ValueError(_in_use(key, path, what, lock.owner()))
    try:
        yield
    finally:
        lock.release()
        _remove_empty(made)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def await_owner(key: str, folder: Path, *, job: str, patience: float = 5.0) -> None:
    """Returns unless ``folder`` has an owner of another job: for the ranks that own nothing.

    The rank that owns is refused then; the others would wait for it to join them.

    Args:
        key: the configuration key that names the folder.
        folder: the folder, which need not be there.
        job: what all processes that were launched together share.
        patience: seconds in which the owner may be ending.

    Raises:
        ValueError: as :func:`owned_folder` raises it.
    """
    deadline = time.monotonic() + patience
    path = folder / OWNER_FILE
    while True:
        owner = _holder(path)
        if owner is None or (job and owner.job == job):
            return
        if time.monotonic() > deadline:
            raise ValueError(_in_use(key, folder, "", owner))
        time.sleep(_POLL_SECONDS)


def live_owner(folder: Path) -> Owner | None:
    """Returns whoever owns ``folder`` now; None for nobody."""
    return _holder(folder / OWNER_FILE)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, between processes, on the file ``path`` (created if needed).

    Waits for another holder, and says so when that takes long. The lock goes away with the process
    that holds it, however that process ends.

    Raises:
        OSError: when the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _Lock(path)
    begun, said = time.monotonic(), False
    while not lock.take(patience=_POLL_SECONDS):
        if not said and time.monotonic() - begun > _SILENT_SECONDS:
            said = True
            holder = lock.owner()
            _say(f"waiting for {path}, held by {holder or 'another process'}")
    try:
        yield
    finally:
        lock.release()


class _Lock:
    """Is the lock on one file, from its taking to its release."""

    def __init__(self, path: Path, *, job: str = "", allocation: str = "") -> None:
        # Whoever changes the working directory meanwhile lets go of the same file.
        self.path = path.absolute()
        pid = os.getpid()
        self.me = Owner(platform.node(), pid, _now(), _started(pid) or 0, job, allocation)
        self._descriptor = -1

    def take(self, patience: float = _ENDING_SECONDS) -> bool:
        """Takes the lock, and returns whether it is had.

        It tries for ``patience`` seconds, or for those of a lease where this job's earlier life
        holds the lock.
        """
        begun = time.monotonic()
        said = False
        while not self._try():
            owner = self.owner()
            waited = time.monotonic() - begun
            earlier_life = (
                owner is not None
                and self.me.allocation != ""
                and owner.allocation == self.me.allocation
                and not owner.is_seen_alive
            )
            if waited > (_LEASE_SECONDS if earlier_life else patience):
                return False
            if earlier_life and waited > _SILENT_SECONDS and not said:
                said = True
                _say(f"{self.path}: waiting for the lock of this job's earlier life ({owner})")
            time.sleep(_POLL_SECONDS)
        return True

    def owner(self) -> Owner | None:
        """Returns whoever the file names; None while it names nobody."""
        return _named(self.path)

    def release(self) -> None:
        """Lets the next one have the lock; does nothing in a forked child, which has none."""
        if self._descriptor not in _held or os.getpid() != self.me.process:
            return
        # While it is held: whoever opened this file before finds another, or none, in its place.
        try:
            os.unlink(self.path)
        except OSError:
            pass
        finally:
            _close(self._descriptor)

    def _try(self) -> bool:
        descriptor = _opened(self.path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(descriptor)
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                _close(descriptor)
                raise
            owner = self.owner()
            if owner is not None and owner.is_seen_alive:
                _close(descriptor)
                return False
            _say_without_locks(self.path, error)
        if not _lies_at(descriptor, self.path):
            _close(descriptor)
            return False
        with suppress(OSError):  # what is missing then is a name, not the lock
            record = (json.dumps(asdict(self.me)) + "\n").encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, record, 0)
        self._descriptor = descriptor
        return True


def _opened(path: Path) -> int:
    flags = os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        # Another user's, left by a killed process: a lock needs no writing.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        # Whoever made the folder has just left it, and removed it since it was empty.
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    _held.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _lies_at(descriptor: int, path: Path) -> bool:
    """Returns whether the open file is the one of that name.

    The name is opened anew, so that a file server is asked then.
    """
    try:
        other = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return os.path.sameopenfile(descriptor, other)
    finally:
        os.close(other)


def _holder(path: Path) -> Owner | None:
    """Returns whoever holds the lock at ``path``; None for nobody."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    _held.add(descriptor)
    try:
        # Shared, and for a moment: whoever tries to take the lock meanwhile tries again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(path) or Owner("a host not known", 0, "now")
    except OSError:
        owner = _named(path)
        return owner if owner is not None and owner.is_seen_alive else None
    finally:
        _close(descriptor)
    return None


def _named(path: Path) -> Owner | None:
    try:
        with path.open("rb") as file:
            return Owner(**json.loads(file.read(_RECORD_BYTES)))
    except (OSError, ValueError, TypeError):
        return None


def _started(process: int) -> int | None:
    """Returns when a process of this machine began, in the kernel's ticks.

    It is 0 where that is not known, as without /proc, and None where there is no such process.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else 0
    except (OSError, ValueError, IndexError):
        return 0


def _remove_empty(made: list[Path]) -> None:
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:
            return


def _in_use(key: str, path: Path, what: str, owner: Owner | None) -> str:
    return (
        f"{key}: {what}{path} is in use by {owner or 'another process'}; wait until it has ended, "
        "or name another"
    )


def _say_without_locks(path: Path, error: OSError) -> None:
    global _said_without_locks
    if not _said_without_locks:
        _said_without_locks = True
        _say(
            f"WARNING: no file locks in {path.parent} ({error.strerror}): another process that "
            "writes there is noticed on this host only"
        )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
