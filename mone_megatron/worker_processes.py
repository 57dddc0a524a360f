"""Computes a function of many inputs in processes, with the results in the order of the inputs.

``concurrent.futures.ProcessPoolExecutor`` of the Pythons that are supported can wait for ever when
one of its processes is killed while the next input is handed over (its manager thread and the
caller change the same dict; mended in Python 3.12). Here every process has a pipe of its own, which
nobody else holds: its end is the pipe's end, for both sides, whatever was half said.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from mone_megatron.helpers import HelperError, HelperThread, ending, one_line, starting

Input = TypeVar("Input")
Output = TypeVar("Output")

# Inputs handed to a process before its first result is taken: none of them waits for work.
_IN_FLIGHT = 4


class WorkerProcesses(Generic[Input, Output]):
    """Runs processes that each call one function, and ends them with the ``with`` block."""

    def __init__(
        self,
        function: Callable[[Input], Output],
        count: int,
        *,
        one: str,
        many: str,
        otherwise: str,
    ) -> None:
        """Prepares them; each is started when there is an input for it.

        Args:
            function: can be pickled, as can its inputs and outputs.
            count: how many processes there are at most.
            one: one of them in an error, such as ``a tokenizing process (--workers)``.
            many: all of them in an error, such as ``2 tokenizing processes (--workers)``.
            otherwise: how to do without them, such as ``--workers 1 tokenizes in one process``.
        """
        self._function = function
        self._count = count
        self._one, self._many, self._otherwise = one, many, otherwise
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerProcesses[Input, Output]:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    def results(self, inputs: Iterable[Input]) -> Iterator[Output]:
        """Yields the function's value for each input, in the order of the inputs.

        Inputs are read no faster than they are worked on, which bounds the memory.

        Raises:
            HelperError: a process could not be started, or was killed.
            ValueError: when the function raises one.
        """
        asked: deque[_Worker] = deque()
        for item in inputs:
            worker = self._least_busy()
            self._telling(worker, worker.ask, item)
            asked.append(worker)
            if len(asked) >= self._count * _IN_FLIGHT:
                yield self._answer(asked.popleft())
        while asked:
            yield self._answer(asked.popleft())

    def _least_busy(self) -> _Worker:
        if len(self._workers) < self._count:
            # Spawned rather than forked: libraries of the parent may have threads.
            with starting(self._many, self._otherwise):
                self._workers.append(_Worker(self._function))
            return self._workers[-1]
        return min(self._workers, key=lambda worker: worker.asked)

    def _answer(self, worker: _Worker) -> Output:
        answer: _Answer = self._telling(worker, worker.answer)
        if answer.refusal is not None:
            raise answer.refusal
        if answer.failure:
            raise HelperError(f"{self._one} failed: {answer.failure}")
        return answer.value

    def _telling(self, worker: _Worker, do: Callable[..., Any], *arguments: object) -> Any:
        """Returns the value of a call that talks to a worker, or raises how that one ended."""
        try:
            return do(*arguments)
        except (EOFError, OSError) as error:
            raise HelperError(f"{self._one} {worker.ended()}; {self._otherwise}") from error


@dataclass(frozen=True)
class _Answer:
    """Holds what a process says of one input: its value, a refusal or a failure."""

    value: Any = None
    refusal: ValueError | None = None
    failure: str = ""


class _Worker:
    """Holds one process and the pipe to it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, function), daemon=True
        )
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            # Now nobody but the process holds it.
            theirs.close()
        # Inputs without a result yet.
        self.asked = 0

    def ask(self, item: object) -> None:
        self._pipe.send(item)
        self.asked += 1

    def answer(self) -> _Answer:
        answer: _Answer = self._pipe.recv()
        self.asked -= 1
        return answer

    def ended(self) -> str:
        """Returns how the process, whose pipe has ended, ended itself."""
        self._process.join(10)
        assert self._process.exitcode is not None
        return ending(self._process.exitcode)

    def end(self) -> None:
        """Ends the process, which holds nothing that could be lost."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Answers each input of the pipe until the pipe ends, with the parent or because of it."""
    inputs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    # Reads ahead, so that the parent never waits to hand over while its own answers wait here.
    def read() -> None:
        try:
            while True:
                inputs.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)

    HelperThread(read, name="inputs").start()
    while True:
        try:
            answer = _Answer(function(inputs.get()))
        except ValueError as error:
            answer = _Answer(refusal=error)
        except Exception as error:
            # What cannot be pickled could not be sent; its words can.
            answer = _Answer(failure=one_line(error))
        pipe.send(answer)
