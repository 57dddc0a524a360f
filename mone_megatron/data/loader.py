"""Which samples make up which microbatch, and the loader that fetches them.

The rule: step s trains on samples ``[s*G, (s+1)*G)`` (G the global batch size, M the micro batch
size). Its microbatch j is samples ``s*G + j*M + [0, M)``, and data-parallel rank r of d takes the
microbatches with ``j % d == r``, in order. So the step, not the layout, decides what a microbatch
holds, and a run may resume at another data-parallel size without skipping or repeating a sample.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader

Batch = dict[str, torch.Tensor]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleDataset(Protocol):
    """A map from sample index to tensors [seq], as megatron-core's GPT datasets are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class MicrobatchSampler:
    """The microbatches of one data-parallel rank, as lists of sample indices.

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
        """Microbatches of this rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def samples_needed(self) -> int:
        """The length a dataset must have for all steps up to ``end_step``."""
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
        dataset: where the samples are.
        sampler: which ones, from which step.
        num_workers: loader processes; 0 loads in this one. The order does not depend on it.
        pin: returns tensors in pinned memory (needs CUDA).

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
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # a Protocol, not a subclass of Dataset
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_outlive_group_signals,
        # Without a generator of its own the loader draws from torch's global stream, and training
        # would depend on how many loaders were built.
        generator=torch.Generator(),
    )
    return _start(loader)


def _start(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Starts the loader processes with SIGTERM blocked in every thread that they will have.

    Libraries start threads right after a fork, before :func:`_outlive_group_signals` runs, and a
    signal to a process goes to any thread that lets it in.
    """
    if sys.platform != "linux":
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load_here(dataset: SampleDataset, sampler: MicrobatchSampler, pin: bool) -> Iterator[Batch]:
    for indices in sampler:
        batch = _collate([dataset[index] for index in indices])
        yield {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def _collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
    return {key: torch.stack([sample[key] for sample in samples]) for key in _KEYS}


def _outlive_group_signals(worker: int) -> None:
    """Leaves the end of a loader process to its parent.

    Ctrl-C and a scheduler's SIGTERM reach every process of a job, and the training process still
    needs its loaders to finish the step and save. So only a SIGTERM sent by it counts; ignoring all
    of them would hang its exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # sigwaitinfo, which names the sender, is missing on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = os.getppid()
        threading.Thread(target=_exit_on_sigterm_from, args=(parent,), daemon=True).start()


def _exit_on_sigterm_from(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(128 + signal.SIGTERM)
