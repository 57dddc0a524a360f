"""Runs functions in real processes joined by gloo: how a test sees several ranks.

The processes use the CPU backend with one thread each, have what they need imported from the start
(:mod:`.warm_start`), and can be kept to run many functions one after another, each in a process
group of its own:

    with Processes(2) as processes:
        results = processes.run(function, argument)  # results[rank]

``function`` must be importable (defined at the top level of a module) and finds
``torch.distributed`` initialised; arguments and results are pickled.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from mone_megatron.helpers import end_with_parent, ending, starting
from mone_megatron.parallel.groups import close_groups
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.testing.warm_start import forget_start_method, warm_context

P = ParamSpec("P")
T = TypeVar("T")


# What a process says when it can take functions, and how long it may take to.
_READY = pickle.dumps((True, None))
_START_SECONDS = 300.0
# After one rank's failure, how long the others may take to report theirs.
_GRACE_SECONDS = 0.5
# How long the exit code of one that is gone may take to be told, on a busy machine.
_DEATH_SECONDS = 60.0


class RankFailedError(RuntimeError):
    """Says that a function failed in one of the processes, with that rank's traceback."""


def _serve(rank: int, size: int, pipe: Connection) -> None:
    """Runs what comes through ``pipe`` until it is closed or killed: what each process does."""
    end_with_parent()
    forget_start_method()
    torch.set_num_threads(1)
    # Before unpickling a function imports its module, which may import megatron-core.
    install_cpu_backend()
    pipe.send_bytes(_READY)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            # Not when the last function returned: a rank that leaves early breaks the connections
            # of one that is still using them. By now all have answered.
            close_groups()
            function, args, kwargs, rendezvous, seconds = pickle.loads(message)
            dist.init_process_group(
                "gloo",
                init_method=rendezvous,
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=seconds),
            )
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException:
            # The groups stay open: closing them would make the other ranks fail, too, and hide
            # which failed first. The parent ends this process.
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


class Processes:
    """Manages ``size`` gloo processes, started when first used. It is a context manager: what is
    opened must be closed.
    """

    def __init__(self, size: int, *, timeout_seconds: float = 300.0, warm: bool = True) -> None:
        """Prepares the processes and starts none yet.

        Args:
            size: how many ranks.
            timeout_seconds: for each :meth:`run`, once the processes have started. It ends what
                hangs, and is long enough for a machine with several times as much to do as cores.
            warm: whether they are forked from a process that has imported everything, which is
                quick, or spawned, which leaves each the memory and the imports of its own.
        """
        self.size = size
        self._warm = warm
        self.timeout_seconds = timeout_seconds
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Calls ``function`` on every rank and returns the results by rank.

        After a failure the processes are ended, and started afresh by the next call.

        Raises:
            RankFailedError: when a rank raises, dies, or does not return in time.
        """
        try:
            if not self._workers:
                self._start()
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = f"file://{Path(folder, 'store')}"
                message = pickle.dumps((function, args, kwargs, rendezvous, self.timeout_seconds))
                for _, pipe in self._workers:
                    pipe.send_bytes(message)
                return self._results(self.timeout_seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes; they start again when used again."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def _start(self) -> None:
        context = warm_context() if self._warm else multiprocessing.get_context("spawn")
        for rank in range(self.size):
            with starting(f"rank {rank} of {self.size}"):
                ours, theirs = context.Pipe()
                # Not a daemon: those may have no children, and saving a checkpoint starts one.
                process = context.Process(
                    target=_serve, args=(rank, self.size, theirs), name=f"rank{rank}", daemon=False
                )
                process.start()
            # Only the child may hold its end, or its death would not close the pipe.
            theirs.close()
            self._workers.append((process, ours))
        self._results(_START_SECONDS)

    def _results(self, seconds: float) -> list[Any]:
        """Returns what each rank answers next."""
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < self.size:
            waiting = {
                pipe: rank
                for rank, (_, pipe) in enumerate(self._workers)
                if rank not in results and rank not in failures
            }
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    succeeded, result = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    # Its end of the pipe is closed: it is gone, and the fork server tells how soon.
                    self._workers[rank][0].join(_DEATH_SECONDS)
                    code = self._workers[rank][0].exitcode
                    succeeded, result = False, f"it {ending(code or 0)}"
                (results if succeeded else failures)[rank] = result
            if failures:
                # The others may say why, or may hang for want of this one.
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            told = [f"rank {rank} of {self.size} failed: {why}" for rank, why in failures.items()]
            raise RankFailedError("\n".join(told))
        if len(results) < self.size:
            late = [rank for rank in range(self.size) if rank not in results]
            raise RankFailedError(f"ranks {late} of {self.size} did not return in {seconds} s")
        return [results[rank] for rank in range(self.size)]


def run_in_processes(
    size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Calls :meth:`Processes.run` in fresh processes that end afterwards."""
    with Processes(size) as processes:
        return processes.run(function, *args, **kwargs)
