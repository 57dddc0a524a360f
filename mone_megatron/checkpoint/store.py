"""Keeps a run's folder of checkpoints: saves appear in it whole or not at all.

A save is made in a hidden folder, brought to disk, described by a manifest written last, renamed
to its name, and then named by the tracker. One process (rank 0) calls the methods that change the
store; the other ranks only write into the folder that :meth:`CheckpointStore.begin` returned.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mone_megatron.checkpoint import durable
from mone_megatron.checkpoint.digests import MANIFEST_NAME, FileDigest, digest_files, list_files
from mone_megatron.checkpoint.errors import (
    DamagedCheckpointError,
    NoUsableCheckpointError,
    write_error,
)
from mone_megatron.checkpoint.facts import check_facts
from mone_megatron.checkpoint.manifest import FORMAT, Manifest, encode_manifest
from mone_megatron.checkpoint.names import (
    HiddenName,
    checkpoint_name,
    hidden_name,
    host_name,
    parse_hidden,
    step_of,
)
from mone_megatron.checkpoint.reader import Checkpoint, open_checkpoint, read_checkpoint
from mone_megatron.checkpoint.retention import Saved, steps_to_delete
from mone_megatron.checkpoint.tracker import TRACKER_NAME, Tracker, read_tracker, write_tracker

# A save on another machine that wrote nothing for so long is dead.
_GRACE_SECONDS = 3600.0


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class CheckpointStore:
    """Keeps the checkpoints of one run: saves, finds, verifies and deletes them."""

    def __init__(self, folder: Path, *, log: Callable[[str], None] = _to_stderr) -> None:
        """Touches nothing yet.

        Args:
            folder: usually ``run.dir/checkpoints``; made by the first save.
            log: is told what was skipped, restored or removed, one line at a time.
        """
        self.folder = folder
        self._log = log
        self._running: set[Path] = set()

    # Saving

    def begin(self, step: int, *, needed_bytes: int | None = None) -> Path:
        """Makes the hidden folder that all ranks write a save into, and returns it.

        Args:
            step: optimizer steps done.
            needed_bytes: what the save will take, if known: refused now when it cannot fit.

        Raises:
            CheckpointWriteError: naming the path, and the bytes needed where known.
        """
        partial = self.folder / hidden_name(step, "partial")
        try:
            for folder in reversed([self.folder, *self.folder.parents]):
                if not folder.exists():
                    durable.make_folder(folder)
            if needed_bytes is not None and shutil.disk_usage(self.folder).free < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            durable.make_folder(partial)
        except OSError as error:
            self._discard(partial)
            raise write_error(error, partial, needed_bytes=needed_bytes) from error
        self._running.add(partial)
        return partial

    def commit(
        self,
        partial: Path,
        facts: Mapping[str, Any],
        *,
        files: Mapping[str, FileDigest] | None = None,
    ) -> Path:
        """Turns a save that all ranks have written into the run's newest checkpoint.

        An existing checkpoint of the same step stays whole until this one is. After an error the
        partial folder is gone and the checkpoints and the tracker are as before, unless only the
        tracker could not be written: then the message names it, and the new checkpoint stays.

        Args:
            partial: from :meth:`begin`.
            facts: plain JSON values; see :func:`~mone_megatron.checkpoint.facts.check_facts`.
            files: the union over all ranks of ``digest_files(partial, rank=, world_size=)``, which
                brought each file to disk; None does that here, alone.

        Returns:
            The checkpoint's folder.

        Raises:
            ValueError: facts that JSON cannot hold or that hold a secret; files that are not
                those of the folder; an empty save.
            CheckpointWriteError: naming the path, and the bytes needed where known.
        """
        step = self._step_of_partial(partial)
        try:
            plain = check_facts(facts, environment=os.environ)
            manifest = Manifest(
                format=FORMAT,
                step=step,
                serial=1 + max((one.manifest.serial for one in self._readable()), default=0),
                saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(),
                facts=plain,
                files=self._checked_files(partial, files),
            )
            text = encode_manifest(manifest)
            durable.write_new_file(partial / MANIFEST_NAME, text)
            durable.sync(partial)
            replaced = self._rename_into_place(partial, step)
            name = checkpoint_name(step)
            digest = hashlib.sha256(text).hexdigest()
            write_tracker(self.folder, Tracker(step=step, folder=name, manifest_sha256=digest))
        except OSError as error:
            self._discard(partial)
            raise write_error(error, partial) from error
        except ValueError:
            self._discard(partial)
            raise
        self._running.discard(partial)
        if replaced is not None:
            self._remove(replaced)
        return self.folder / name

    def abort(self, partial: Path) -> None:
        """Removes a save that will not be committed; one that is gone already is fine.

        Raises:
            ValueError: the folder is not a partial save of this store.
        """
        self._step_of_partial(partial)
        self._discard(partial)

    def _step_of_partial(self, partial: Path) -> int:
        hidden = parse_hidden(partial.name)
        if hidden is None or hidden.kind != "partial" or partial.parent != self.folder:
            raise ValueError(f"{partial} is not a partial checkpoint in {self.folder}")
        return hidden.step

    def _checked_files(
        self, partial: Path, files: Mapping[str, FileDigest] | None
    ) -> dict[str, FileDigest]:
        if files is None:
            files = digest_files(partial)
        listing = list_files(partial)
        if not listing.files:
            raise ValueError(f"{partial} holds no files; every rank must write before the commit")
        for name in sorted(set(files) ^ set(listing.files)) + listing.strange:
            what = "vanished" if name in files else "was not hashed by any rank"
            raise ValueError(f"{partial / name} {what}; hash after all ranks have written")
        for name, size in listing.files.items():
            if files[name].size != size:
                raise ValueError(f"{partial / name} changed after it was hashed")
        for name in listing.folders:
            durable.sync(partial / name)
        return dict(files)

    def _rename_into_place(self, partial: Path, step: int) -> Path | None:
        """Gives a save its name; returns where the checkpoint that had it is now, if one had."""
        final = self.folder / checkpoint_name(step)
        if not os.path.lexists(final):
            durable.rename(partial, final)
            return None
        # A folder cannot be renamed over one that holds files. Between the two renames the old
        # one is whole under its hidden name, where readers and `clean` look for it.
        replaced = self.folder / hidden_name(step, "replaced")
        try:
            durable.rename(final, replaced)
            durable.rename(partial, final)
        except OSError:
            if os.path.lexists(replaced) and not os.path.lexists(final):
                durable.rename(replaced, final)
            raise
        return replaced

    def _discard(self, partial: Path) -> None:
        self._running.discard(partial)
        if os.path.lexists(partial):
            self._remove(partial)

    def _remove(self, path: Path) -> None:
        """Deletes a hidden folder; what cannot be deleted now, ``clean`` tries again."""
        try:
            durable.remove_tree(path)
        except OSError as error:
            self._log(f"WARNING: {path} could not be removed ({error.strerror})")

    # Reading

    def newest_verified(
        self, *, check: Callable[[Checkpoint], list[str]] = Checkpoint.damage
    ) -> Checkpoint | None:
        """Returns the checkpoint to continue from: the tracker's, else the newest that verifies.

        Everything damaged on the way is logged by file name.

        Args:
            check: returns what is wrong with a checkpoint, as :meth:`Checkpoint.damage` does; give
                one that hands each rank its share to verify with all ranks.

        Returns:
            The checkpoint; None when the run has not saved anything.

        Raises:
            NoUsableCheckpointError: there were checkpoints, and none verifies.
        """
        entries = self._entries()
        candidates = self._candidates()
        unreadable = len(entries) - len(candidates)
        for skipped, checkpoint in enumerate(candidates, start=unreadable):
            problems = check(checkpoint)
            if not problems:
                if skipped:
                    self._log(f"WARNING: continuing from {checkpoint.path}, which verifies")
                return checkpoint
            self._report(DamagedCheckpointError(checkpoint.path, problems))
        if entries or os.path.lexists(self.folder / TRACKER_NAME):
            raise NoUsableCheckpointError(
                f"no checkpoint in {self.folder} can be used, though the run saved some; restore "
                "one, or start afresh with checkpoint.resume=never"
            )
        return None

    def open(self, path: Path) -> Checkpoint:
        """Opens and verifies a checkpoint at any place; see :func:`open_checkpoint`.

        Raises:
            DamagedCheckpointError: naming each damaged file and what is wrong with it.
        """
        return open_checkpoint(path)

    def checkpoints(self) -> list[Checkpoint]:
        """Returns the checkpoints whose manifest can be read, oldest save first; not verified."""
        return sorted(self._readable(), key=lambda one: (one.manifest.serial, one.step))

    def _entries(self) -> list[Path]:
        """Returns the folders that are checkpoints, by name alone."""
        if not self.folder.is_dir():
            return []
        names = os.listdir(self.folder)
        final = [name for name in names if step_of(name) is not None]
        # The save that was to take its place was killed between the two renames.
        for name in names:
            hidden = parse_hidden(name)
            if hidden and hidden.kind == "replaced" and checkpoint_name(hidden.step) not in names:
                final.append(name)
        return [self.folder / name for name in sorted(final)]

    def _readable(
        self, report: Callable[[DamagedCheckpointError], None] = lambda _: None
    ) -> list[Checkpoint]:
        readable: list[Checkpoint] = []
        for path in self._entries():
            try:
                readable.append(read_checkpoint(path))
            except DamagedCheckpointError as error:
                report(error)
        return readable

    def _candidates(self) -> list[Checkpoint]:
        """Returns the readable checkpoints in the order to try them."""
        readable = self._readable(self._report)
        readable.sort(key=lambda one: (one.manifest.serial, one.step), reverse=True)
        try:
            tracker = read_tracker(self.folder)
        except ValueError as error:
            self._log(f"WARNING: {error}; looking for the newest checkpoint")
            return readable
        if tracker is None:
            if readable:
                self._log(f"WARNING: {self.folder / TRACKER_NAME} is missing; using what is there")
            return readable
        tracked = [
            one
            for one in readable
            if (one.step, one.manifest_sha256) == (tracker.step, tracker.manifest_sha256)
        ]
        if not tracked:
            self._log(
                f"WARNING: {self.folder / TRACKER_NAME} names {tracker.folder} with a manifest "
                "that is not there; looking for the newest checkpoint"
            )
        return tracked + [one for one in readable if one not in tracked]

    def _report(self, error: DamagedCheckpointError) -> None:
        self._log(f"WARNING: {error}; it is not used")

    # Removing

    def retain(self, *, last: int, every: int) -> list[int]:
        """Deletes all checkpoints but the newest ``last`` and those at multiples of ``every``.

        The tracker's checkpoint stays, and so does a folder whose manifest cannot be read, which
        someone may want to look at. A kill at any moment leaves only whole checkpoints.

        Args:
            last: at least 1.
            every: 0 for none.

        Returns:
            The steps deleted.

        Raises:
            ValueError: ``last`` or ``every`` out of range.
        """
        # Their names are their steps; one that was set aside is not retention's to judge.
        saved = {one.step: one for one in self._readable() if step_of(one.path.name) is not None}
        try:
            tracker = read_tracker(self.folder)
        except ValueError as error:
            self._log(f"WARNING: {error}; no checkpoint is deleted")
            return []
        steps = steps_to_delete(
            [Saved(step=step, serial=one.manifest.serial) for step, one in saved.items()],
            last=last,
            every=every,
            keep=[] if tracker is None else [tracker.step],
        )
        deleted = []
        for step in steps:
            dead = self.folder / hidden_name(step, "deleted")
            try:
                durable.rename(saved[step].path, dead)
            except OSError as error:
                self._log(f"WARNING: {saved[step].path} could not be removed ({error.strerror})")
                continue
            self._remove(dead)
            deleted.append(step)
        return deleted

    def clean(self, *, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Removes what killed saves and deletions left; call it when a run starts.

        A save that another process may still be making stays: one whose process lives on this
        machine, or that belongs to another machine, until nothing was written into it for
        ``grace_seconds``.
        """
        if not self.folder.is_dir():
            return
        for name in sorted(os.listdir(self.folder)):
            path = self.folder / name
            hidden = parse_hidden(name)
            if name.startswith(f".{TRACKER_NAME}.tmp-"):
                if _idle_seconds(path) > grace_seconds:
                    self._remove(path)
            elif hidden is None or self._is_running(path, hidden, grace_seconds):
                continue
            elif hidden.kind == "replaced" and not os.path.lexists(
                self.folder / checkpoint_name(hidden.step)
            ):
                durable.rename(path, self.folder / checkpoint_name(hidden.step))
                self._log(f"restored {checkpoint_name(hidden.step)}, which a killed save replaced")
            else:
                self._remove(path)
                if hidden.kind == "partial":
                    self._log(f"removed {path}, left by a save that did not end")

    def _is_running(self, path: Path, hidden: HiddenName, grace_seconds: float) -> bool:
        if hidden.kind == "deleted":
            return False
        if hidden.host == host_name():
            # This process's own number on a folder it does not know: an earlier process had it.
            if hidden.pid == os.getpid():
                return path in self._running
            if not _is_alive(hidden.pid):
                return False
        return _idle_seconds(path) <= grace_seconds


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _idle_seconds(path: Path) -> float:
    """Returns the seconds since anything in ``path`` was written; 0 for what is going away."""
    try:
        newest = os.lstat(path).st_mtime
        if path.is_dir():
            listing = list_files(path)
            names = [*listing.files, *listing.folders, *listing.strange]
            newest = max([newest, *(os.lstat(path / name).st_mtime for name in names)])
    except FileNotFoundError:
        return 0.0
    return time.time() - newest
