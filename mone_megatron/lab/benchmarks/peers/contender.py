"""Runs one contender in a process of its own, so that its memory and its start are its own."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from mone_megatron.helpers import HelperError, end_with_parent, ending, starting
from mone_megatron.lab.benchmarks.peers.task import Arrays, PeerTask

# How long a contender may take for one answer.
_ANSWER_SECONDS = 600.0


class Work(Protocol):
    """Trains one model, a step at a time."""

    # Of the model; 0 where there is none.
    parameters: int

    def step(self) -> float:
        """Trains one step and returns its loss; it returns when the step's work is done."""


@dataclass(frozen=True)
class Turn:
    """Holds what one step took on average over a turn of some steps, in seconds."""

    clock: float
    processor: float
    loss: float


def _ours(task: PeerTask) -> Work:
    from mone_megatron.lab.benchmarks.peers.ours import OurWork

    return OurWork(task)


def _transformers(task: PeerTask) -> Work:
    from mone_megatron.lab.benchmarks.peers.transformers_work import TransformersWork

    return TransformersWork(task)


def _products(task: PeerTask) -> Work:
    from mone_megatron.lab.benchmarks.peers.products import ProductsWork

    return ProductsWork(task)


# Imports are in the functions: none is to have another one's libraries in its memory.
_MAKERS: dict[str, Callable[[PeerTask], Work]] = {
    "ours": _ours,
    "transformers": _transformers,
    "products": _products,
}


class Contender:
    """Is a process that trains what it is given. It is a context manager."""

    def __init__(self, kind: str) -> None:
        """Starts the process.

        Args:
            kind: ``ours``, ``transformers`` or ``products``.

        Raises:
            HelperError: when it cannot be started.
        """
        assert kind in _MAKERS, kind
        self.kind = kind
        self.started = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        with starting(f"a process for {kind}"):
            self._pipe, theirs = context.Pipe()
            # Not a daemon: those may have no children, and loading data may start some.
            self._process = context.Process(target=_serve, args=(kind, theirs), daemon=False)
            self._process.start()
        theirs.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def open(self, task: PeerTask) -> int:
        """Builds the model of a task, in place of the one before; returns its parameters.

        Raises:
            ValueError: a contender cannot train this, and why.
            HelperError: it failed otherwise.
        """
        parameters: int = self._ask("open", task)
        return parameters

    def run(self, steps: int) -> Turn:
        """Trains steps, and returns what one took."""
        turn: Turn = self._ask("run", steps)
        return turn

    def batches(self) -> tuple[tuple[Arrays, ...], ...]:
        """Returns the microbatches that it loaded by itself."""
        batches: tuple[tuple[Arrays, ...], ...] = self._ask("batches")
        return batches

    def processor_seconds(self) -> float:
        """Returns the processor time of its process since it was started."""
        seconds: float = self._ask("processor")
        return seconds

    def peak_megabytes(self) -> float:
        """Returns the most memory its process has held (of the GPU, if it computes there)."""
        megabytes: float = self._ask("peak")
        return megabytes

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((what, arguments))
            if not self._pipe.poll(_ANSWER_SECONDS):
                raise HelperError(f"{self.kind}: no answer in {_ANSWER_SECONDS:.0f} s")
            error, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(1.0)
            raise HelperError(f"{self.kind}: it {ending(self._process.exitcode or 0)}") from None
        if error == "ValueError":
            raise ValueError(answer)
        if error:
            raise HelperError(f"{self.kind}: {answer}")
        return answer


def _serve(kind: str, pipe: Connection) -> None:
    """Answers what comes through ``pipe`` until it is closed: what the process does."""
    end_with_parent()
    server = _Server(kind)
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("", getattr(server, what)(*arguments))
        except ValueError as error:
            answer = ("ValueError", str(error))
        except Exception as error:
            print(traceback.format_exc(), file=sys.stderr, flush=True)
            answer = (type(error).__name__, " ".join(f"{type(error).__name__}: {error}".split()))
        pipe.send(answer)


class _Server:
    """Does what a :class:`Contender` is asked; its methods are the questions."""

    def __init__(self, kind: str) -> None:
        self.make = _MAKERS[kind]
        self.work: Any = None
        self.on_gpu = False

    def open(self, task: PeerTask) -> int:
        # The model before must be gone first.
        self.work = None
        gc.collect()
        self.on_gpu = task.config.device.kind == "cuda"
        self.work = self.make(task)
        return int(self.work.parameters)

    def run(self, steps: int) -> Turn:
        loss = 0.0
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.work.step()
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        return Turn(clock / steps, processor / steps, loss)

    def batches(self) -> tuple[tuple[Arrays, ...], ...]:
        batches: tuple[tuple[Arrays, ...], ...] = self.work.batches()
        return batches

    def processor(self) -> float:
        return time.process_time()

    def peak(self) -> float:
        if self.on_gpu:
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise ValueError("peers: the peak memory of a process is read from Linux's /proc")
