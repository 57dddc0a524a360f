"""Says which samples make up which microbatch, and loads them.

The rule: step s trains on samples ``[s*G, (s+1)*G)`` (G the global batch size, M the micro batch
size). Its microbatch j is samples ``s*G + j*M + [0, M)``, and data-parallel rank r of d takes the
microbatches with ``j % d == r``, in order. So the step, not the layout, decides what a microbatch
holds, and a run may resume at another data-parallel size without skipping or repeating a sample.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from mone_megatron.forked_children import FORK
from mone_megatron.helpers import HelperError, HelperThread, ending, one_line, starting

Batch = dict[str, torch.Tensor]
# As loader processes send it.
_Arrays = dict[str, npt.NDArray[Any]]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_SECONDS_TO_DIE = 10  # after a SIGKILL; more only where a disk does not answer
# What samples of :mod:`mone_megatron.data.apart` have beside them.
DOCUMENTS = "documents"


class SampleDataset(Protocol):
    """Maps a sample's index to tensors [seq], as megatron-core's GPT datasets do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class MicrobatchSampler:
    """Lists the microbatches of one data-parallel rank, each as a list of sample indices.

    Iterating yields ``microbatches_per_step`` lists for each of the steps
    ``[start_step, end_step)``, each of ``micro_batch_size`` indices. It holds no position: the
    step to start from is all there is to resuming.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    start_step: int
    end_step: int

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.micro_batch_size, self.data_parallel_size) < 1:
            raise ValueError("batch sizes and the data-parallel size must be at least 1")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise ValueError(
                f"data-parallel rank {self.data_parallel_rank} of {self.data_parallel_size}"
            )
        if not 0 <= self.start_step <= self.end_step:
            raise ValueError(f"steps [{self.start_step}, {self.end_step}) are not a range")
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of"
                f" train.micro_batch_size={self.micro_batch_size} times the data-parallel size"
                f" {self.data_parallel_size}"
            )

    @property
    def microbatches_per_step(self) -> int:
        """Returns the number of microbatches of this rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def samples_needed(self) -> int:
        """Returns the length that a dataset must have for all steps up to ``end_step``."""
        return self.end_step * self.global_batch_size

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.microbatches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        size = self.micro_batch_size
        for step in range(self.start_step, self.end_step):
            for local in range(self.microbatches_per_step):
                microbatch = local * self.data_parallel_size + self.data_parallel_rank
                first = step * self.global_batch_size + microbatch * size
                yield list(range(first, first + size))


def build_loader(
    dataset: SampleDataset,
    sampler: MicrobatchSampler,
    num_workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yields the microbatches of ``sampler`` in its order.

    Args:
        dataset: the dataset whose samples are loaded.
        sampler: which samples are loaded, from which step on.
        num_workers: loader processes; 0 loads in this one. The order does not depend on it.
        pin: whether tensors are in pinned memory (needs CUDA).

    Returns:
        An iterator over dicts of CPU tensors [micro_batch, seq]: ``tokens``, ``labels``,
        ``position_ids`` (int64) and ``loss_mask`` (float32). For an evaluation that reads the same
        samples each time, build it anew from the same sampler.

    Raises:
        ValueError: the dataset is shorter than the steps need.
    """
    if sampler.samples_needed > len(dataset):
        raise ValueError(
            f"the dataset has {len(dataset)} samples, step {sampler.end_step} needs"
            f" {sampler.samples_needed}"
        )
    if num_workers == 0:
        return _load_here(dataset, sampler, pin)
    return _FromProcesses(dataset, sampler, num_workers, pin)


class _FromProcesses(Iterator[Batch]):
    """Yields microbatches that processes load, by torch's DataLoader.

    Batches come as NumPy arrays through the pipe of the DataLoader's queue. As tensors they would
    come through shared memory, for which each process needs room in /dev/shm, a socket in TMPDIR
    (whose path has a limit of some 100 characters), and a thread, in which an error is lost.
    """

    def __init__(
        self, dataset: SampleDataset, sampler: MicrobatchSampler, num_workers: int, pin: bool
    ) -> None:
        """Starts the processes.

        Raises:
            HelperError: when they cannot be started.
        """
        loader: DataLoader[_Arrays] = DataLoader(
            dataset,  # type: ignore[arg-type]  # a Protocol, not a subclass of Dataset
            batch_sampler=sampler,
            num_workers=num_workers,
            multiprocessing_context=FORK,
            collate_fn=_collate_arrays,
            worker_init_fn=_outlive_group_signals,
            # Without a generator of its own the loader draws from torch's global stream, and
            # training would depend on how many loaders were built.
            generator=torch.Generator(),
        )
        self._pin = pin
        others = set(multiprocessing.active_children())
        try:
            with starting(
                f"{num_workers} data loader processes (data.num_workers)",
                "data.num_workers=0 loads in the training process",
            ):
                self._batches = _start(loader)
        except BaseException:
            _kill(set(multiprocessing.active_children()) - others)
            raise
        self._workers = sorted(
            set(multiprocessing.active_children()) - others, key=lambda worker: worker.name
        )
        _Deaths.be_told_while_waiting()

    def __next__(self) -> Batch:
        try:
            with _Deaths():
                # One that died meanwhile may have left batches that come first.
                if not all(worker.is_alive() for worker in self._workers):
                    raise RuntimeError("a data loader process has ended")
                arrays = next(self._batches)
        except StopIteration:
            raise
        # torch raises what its handler of SIGCHLD found, and what a process sent, as it was.
        except Exception as error:
            raise HelperError(
                f"a data loader process (data.num_workers={len(self._workers)}) {self._why(error)}"
            ) from error
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return {key: value.pin_memory() for key, value in batch.items()} if self._pin else batch

    def _why(self, error: Exception) -> str:
        """Returns in one line why the loading failed, and ends the other processes.

        Nothing is asked of them any more.
        """
        lines = [line for line in str(error).splitlines() if line.strip()]
        sent = "Original Traceback" in str(error)
        codes = [worker.exitcode for worker in self._workers]
        _kill(self._workers)
        if sent:
            return f"failed: {' '.join(lines[-1].split())}"
        if dead := [code for code in codes if code is not None]:
            return ending(dead[0])
        return f"failed: {one_line(error)}"


def _kill(processes: Iterable[BaseProcess]) -> None:
    """Ends loader processes, which may be in no state to take a SIGTERM, and waits until they have.

    One that is not waited for stays as a zombie, and torch looks at those of all loaders: the next
    loader's wait for a batch would end with the death of this one's.
    """
    killed = list(processes)
    for process in killed:
        process.kill()
    for process in killed:
        process.join(_SECONDS_TO_DIE)


class _Deaths:
    """Says whether the main thread waits for loader processes, and so is to hear of their deaths.

    torch's handler of SIGCHLD raises when a loader process has died, wherever the main thread is:
    within a step or a save, which that has nothing to do with. While it waits for a batch it has
    to be told, since what a process had begun to send never ends; otherwise the next wait says so.
    """

    waiting = False

    def __enter__(self) -> None:
        _Deaths.waiting = True

    def __exit__(self, *exception: object) -> None:
        _Deaths.waiting = False

    @classmethod
    def be_told_while_waiting(cls) -> None:
        """Puts a handler before torch's; once, as torch sets its own once."""
        torch_handler = signal.getsignal(signal.SIGCHLD)
        if getattr(torch_handler, "__qualname__", "").startswith(cls.__name__):
            return
        in_main = threading.current_thread() is threading.main_thread()
        if not callable(torch_handler) or not in_main:
            return

        def tell(number: int, frame: FrameType | None) -> None:
            if cls.waiting:
                torch_handler(number, frame)

        signal.signal(signal.SIGCHLD, tell)


def _start(loader: DataLoader[_Arrays]) -> Iterator[_Arrays]:
    """Starts the loader processes with SIGTERM blocked in every thread that they will have.

    Libraries start threads right after a fork, before :func:`_outlive_group_signals` runs, and a
    signal to a process goes to any thread that lets it in.
    """
    if sys.platform != "linux":
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    hook = sys.unraisablehook
    try:
        return iter(loader)
    except Exception as error:
        # What torch has half made prints a traceback of its own when it is deleted: here.
        sys.unraisablehook = lambda unraisable: None
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        sys.unraisablehook = hook
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load_here(dataset: SampleDataset, sampler: MicrobatchSampler, pin: bool) -> Iterator[Batch]:
    for indices in sampler:
        batch = _collate([dataset[index] for index in indices])
        yield {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def _collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
    keys = [*_KEYS, DOCUMENTS] if DOCUMENTS in samples[0] else _KEYS
    return {key: torch.stack([sample[key] for sample in samples]) for key in keys}


def _collate_arrays(samples: Sequence[Mapping[str, torch.Tensor]]) -> _Arrays:
    return {key: value.numpy() for key, value in _collate(samples).items()}


def _outlive_group_signals(worker: int) -> None:
    """Leaves the end of a loader process to its parent.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job, and the training process still
    needs its loaders to finish the step and save. So only a SIGTERM sent by it counts; ignoring all
    of them would hang its exit.
    """
    # A batch that cannot be sent is reported by a line on stderr only, and waited for for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_die)  # type: ignore
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # sigwaitinfo, which names the sender, is missing on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = os.getppid()
        HelperThread(
            lambda: _exit_on_sigterm_from(parent), name="SIGTERM", on_failure=_die_saying
        ).start()


def _exit_on_sigterm_from(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(128 + signal.SIGTERM)


def _die(error: Exception, unsent: object) -> None:
    _die_saying(f"a batch cannot be sent: {one_line(error)}")


def _die_saying(why: str) -> None:
    """Ends a loader process, which its parent then hears of."""
    print(f"error: data loader process {os.getpid()}: {why}", file=sys.stderr, flush=True)
    os._exit(1)
