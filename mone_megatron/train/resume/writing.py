"""Writing a rank's part of a checkpoint in a child process, beside training or waited for.

megatron-core plans a save and hands over what this rank has to write. Its own writers end in a
queue that is waited for without end when one of them is killed; here a forked process writes, and
a thread hears from it, or of its death.

A forked process sees memory as it was at the fork, so what training changes afterwards is not in
the checkpoint; tensors on a GPU are copied to the host before. Forking needs no second copy on the
host (pages are shared until written to) and no room in /dev/shm.
"""

from __future__ import annotations

import errno
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from mone_megatron.checkpoint import CheckpointWriteError, FileDigest, digest_file, write_error
from mone_megatron.forked_children import FORK
from mone_megatron.helpers import HelperError, HelperThread, ending, one_line, starting
from mone_megatron.train.health.signals import REQUESTS

# (where to write, name in the checkpoint, what to write) of one file: megatron-core's WriteBucket.
_Bucket = tuple[str, str, Any]


# Of each file by name: megatron-core's results of writing it, and its digest.
_Written = dict[str, tuple[list[Any], FileDigest]]


def _write_file(transforms: list[Any], bucket: _Bucket) -> tuple[list[Any], FileDigest]:
    """Writes one file, brings it to disk, and reads it back for its digest."""
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
        return results, digest_file(path)
    except Exception as error:
        raise write_error(error, path) from error


def _write(transforms: list[Any], buckets: list[_Bucket], parent: Connection) -> None:
    """Writes all files, and reports; in the child."""
    # Requests to stop are for the run, which stops after this save.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    try:
        with ThreadPoolExecutor(len(buckets)) as pool:
            files = list(pool.map(partial(_write_file, transforms), buckets))
        answer: _Written | CheckpointWriteError
        answer = {bucket[1]: file for bucket, file in zip(buckets, files, strict=True)}
    # Also no memory and no threads: all that the parent hears of otherwise is an exit code.
    except Exception as error:
        answer = write_error(error, Path(buckets[0][0]))
    with suppress(BrokenPipeError):  # nobody waits for it any more
        parent.send(answer)


class BackgroundSave:
    """Is this rank's part of one save, from its handing over to when all of it is on disk."""

    def __init__(self, request: AsyncRequest) -> None:
        """Starts writing. The tensors may change as soon as this returns.

        Args:
            request: what ``dist_checkpointing.save(..., async_sharded_save=True)`` returned.
        """
        self._request = request
        # Set by the thread before it ends: what _write sent, or why nothing came.
        self._outcome: _Written | CheckpointWriteError | None = None
        self._process: ForkProcess | None = None
        if request.async_fn is None:  # nothing of it is this rank's to write
            self._outcome = {}
            return
        buckets = request.preload_fn() if request.preload_fn else request.async_fn_args[1]
        self._paths = [bucket[0] for bucket in buckets]
        try:
            with starting("the process that writes a checkpoint"):
                self._start(request.async_fn.args[0], buckets)
        except HelperError as error:
            # Every rank hears of it where all of them ask for the outcome.
            self._outcome = self._failure(str(error))

    def _start(self, transforms: list[Any], buckets: list[_Bucket]) -> None:
        receive, send = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_write, args=(transforms, buckets, send), daemon=True)
        try:
            process.start()
            # Only the child may hold its end, or its death would not close the pipe.
            send.close()
            thread = HelperThread(partial(self._listen, process, receive), name="checkpoint")
            thread.start()
        except BaseException:
            send.close()
            receive.close()
            if process.pid is not None:
                process.kill()
            raise
        self._process, self._thread = process, thread

    @property
    def pid(self) -> int | None:
        """Returns the id of the process that writes, if there is something to write."""
        return None if self._process is None else self._process.pid

    @property
    def ended(self) -> bool:
        """Returns whether this rank's files are written, or never will be."""
        return self._outcome is not None

    def wait(self) -> None:
        """Returns when :attr:`ended`."""
        if self._process is not None:
            self._thread.join()

    def error(self) -> CheckpointWriteError | None:
        """Returns why the save failed on this rank, if it did; wait first."""
        return self._outcome if isinstance(self._outcome, CheckpointWriteError) else None

    def digests(self) -> dict[str, FileDigest]:
        """Returns this rank's files by name; wait first, and look at :meth:`error`."""
        assert isinstance(self._outcome, dict)
        return {name: digest for name, (_, digest) in self._outcome.items()}

    def finalize(self) -> None:
        """Has megatron-core write the metadata of all ranks' files. Collective."""
        assert isinstance(self._outcome, dict)
        if self._outcome:
            results = enumerate(results for results, _ in self._outcome.values())
            self._request.async_fn_args[2].put(dict(results))
        for finalize in self._request.finalize_fns:
            finalize()

    def kill(self) -> None:
        """Gives the save up."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def _listen(self, process: ForkProcess, receive: Connection) -> None:
        """Sets the outcome, whatever comes, or does not come, through the pipe."""
        outcome: _Written | CheckpointWriteError
        try:
            outcome = receive.recv()
            process.join()
        except (EOFError, OSError):  # nothing, or the beginning of an answer
            process.join()
            outcome = self._failure(f"the process writing it {ending(process.exitcode or 0)}")
        except Exception as error:
            outcome = self._failure(f"its writer's answer cannot be read: {one_line(error)}")
        receive.close()
        self._outcome = outcome

    def _failure(self, reason: str) -> CheckpointWriteError:
        return CheckpointWriteError(
            Path(self._paths[0]), reason, number=errno.EIO, needed_bytes=None
        )
