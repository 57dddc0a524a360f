"""Forks processes that work: neither what belongs to threads of their parent stops them.

A child has its parent's objects, but none of its threads, and two things follow.

What owns threads, such as a process group, waits for them when it is destroyed, and in a child
waits for ever or ends in a SIGSEGV. So what was the parent's at the fork is never collected in the
child, garbage or not.

And a lock that another thread held at the fork is never let go in the child. That of Python's list
of threads is one until Python 3.12: threads of a process group take it when they touch a Python
object. It is held for a moment, but a job forks thousands of times, and a child that meets it never
begins: a checkpoint then took for ever (seen once in some 1,000 forks on a busy machine). So each
child says when it has begun; one that does not is killed, and another one is forked.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

os.register_at_fork(after_in_child=gc.freeze)

# Seconds for a child to begin, of one after the other. It takes milliseconds, on a machine that
# swaps memory seconds.
_PATIENCE = (15.0, 30.0, 60.0, 120.0)


class _PopenOfOneThatBegins(Popen):
    """Forks until a child has begun."""

    def _launch(self, process_obj: BaseProcess) -> None:
        assert isinstance(process_obj, _Process)
        for seconds in _PATIENCE:
            begun, process_obj.tell_begun = os.pipe()
            try:
                try:
                    super()._launch(process_obj)  # type: ignore[misc]
                finally:
                    os.close(process_obj.tell_begun)  # the child has its own
                if wait([begun], seconds):
                    return  # or it is dead, of which its parent hears as of any other's end
            finally:
                os.close(begun)
            print(f"WARNING: a forked process did not begin in {seconds:g} s", file=sys.stderr)
            self._give_up()
        raise OSError(
            errno.ETIMEDOUT, f"{len(_PATIENCE)} forked processes did not begin, and were killed"
        )

    def _give_up(self) -> None:
        assert self.finalizer is not None
        self.finalizer()  # closes pipes
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class _Process(ForkProcess):
    """Says that it has begun before it does anything else."""

    tell_begun: int

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        return _PopenOfOneThatBegins(process_obj)

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        os.close(self.tell_begun)  # its other end reads that nobody can write
        return super()._bootstrap(parent_sentinel=parent_sentinel)  # type: ignore[misc]


class _Context(ForkContext):
    Process = _Process


FORK = _Context()
"""The context of multiprocessing whose processes begin. ``Process.start`` raises OSError when they
do not."""
