"""Writing a rank's part of a checkpoint in child processes, beside training or waited for.

megatron-core plans a save and hands over what this rank has to write. Its own writers end in a
queue that is waited for without end when one of them is killed; here each file has one forked
process and one thread that hears from it, or of its death.

A forked process sees memory as it was at the fork, so what training changes afterwards is not in
the checkpoint; tensors on a GPU are copied to the host before. Forking needs no second copy on the
host (pages are shared until written to) and no room in /dev/shm.
"""

from __future__ import annotations

import errno
import multiprocessing
import queue
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from mone_megatron.checkpoint import CheckpointWriteError, FileDigest, digest_file, write_error

_FORK = multiprocessing.get_context("fork")
# (where to write, name in the checkpoint, what to write) of one file: megatron-core's WriteBucket.
_Bucket = tuple[str, str, Any]


def _write(transforms: list[Any], bucket: _Bucket, parent: Connection) -> None:
    """In the child: write one file, bring it to disk, read it back for its digest, and report."""
    # Requests to stop are for the run, which stops after this save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    path = Path(bucket[0])
    try:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        counter: queue.Queue[int] = queue.Queue()
        counter.put(0)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, 0, bucket, results_queue=answer, count_queue=counter, use_fsync=True
        )
        _, results = answer.get()
        if isinstance(results, Exception):
            raise results
        parent.send((results, digest_file(path)))
    except Exception as error:
        parent.send(write_error(error, path))


class _FileWriter:
    """One file on its way to disk."""

    def __init__(self, transforms: list[Any], bucket: _Bucket) -> None:
        self.path, self.name = Path(bucket[0]), bucket[1]
        # Set by the thread before it ends: what _write sent, or why nothing came.
        self.outcome: tuple[list[Any], FileDigest] | CheckpointWriteError | None = None
        self._receive, send = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_write, args=(transforms, bucket, send), daemon=True)
        self._process.start()
        # Only the child may hold its end, or its death would not close the pipe.
        send.close()
        self._thread = threading.Thread(target=self._listen, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process that writes."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return self.outcome is not None

    def wait(self) -> None:
        """Return when the outcome is known."""
        self._thread.join()

    def kill(self) -> None:
        """Stop writing; the file stays as it is."""
        self._process.kill()
        self.wait()

    def _listen(self) -> None:
        try:
            outcome = self._receive.recv()
            self._process.join()
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"lost (exit {code})"
            outcome = CheckpointWriteError(
                self.path, f"the process writing it was {how}", number=errno.EIO, needed_bytes=None
            )
        self._receive.close()
        self.outcome = outcome


class BackgroundSave:
    """This rank's part of one save, from when it was handed over to when all of it is on disk."""

    def __init__(self, request: AsyncRequest) -> None:
        """Start writing. The tensors may change as soon as this returns.

        Args:
            request: what ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
        """
        self._request = request
        self._writers: list[_FileWriter] = []
        if request.async_fn is None:  # nothing of it is this rank's to write
            return
        buckets = request.preload_fn() if request.preload_fn else request.async_fn_args[1]
        transforms = request.async_fn.args[0]
        for bucket in buckets:
            self._writers.append(_FileWriter(transforms, bucket))

    @property
    def pids(self) -> list[int]:
        """The processes that write."""
        return [writer.pid for writer in self._writers]

    @property
    def ended(self) -> bool:
        """Whether all of this rank's files are written, or one never will be."""
        return all(writer.ended for writer in self._writers)

    def wait(self) -> None:
        """Return when :attr:`ended`."""
        for writer in self._writers:
            writer.wait()

    def error(self) -> CheckpointWriteError | None:
        """Why the save failed on this rank, if it did; wait first."""
        for writer in self._writers:
            if isinstance(writer.outcome, CheckpointWriteError):
                return writer.outcome
        return None

    def digests(self) -> dict[str, FileDigest]:
        """This rank's files by name; wait first, and look at :meth:`error`."""
        found = {}
        for writer in self._writers:
            assert isinstance(writer.outcome, tuple)
            found[writer.name] = writer.outcome[1]
        return found

    def finalize(self) -> None:
        """Let megatron-core write the metadata of all ranks' files. Collective."""
        if self._writers:
            results = {}
            for number, writer in enumerate(self._writers):
                assert isinstance(writer.outcome, tuple)
                results[number] = writer.outcome[0]
            self._request.async_fn_args[2].put(results)
        for finalize in self._request.finalize_fns:
            finalize()

    def kill(self) -> None:
        """Give the save up."""
        for writer in self._writers:
            writer.kill()
