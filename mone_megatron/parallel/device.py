"""Puts CUDA with NCCL and CPU with gloo behind one small interface."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mone_megatron.config.schema import DeviceConfig
from mone_megatron.counting import counted
from mone_megatron.helpers import HelperError
from mone_megatron.kernels.te_grouped import have_transformer_engine
from mone_megatron.parallel.host_memory import keep_freed_memory
from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend
from mone_megatron.parallel.megatron_compat.gradient_norm import fuse_gradient_norm
from mone_megatron.parallel.megatron_compat.importing import import_megatron
from mone_megatron.parallel.world import World
from mone_megatron.rendezvous_errors import why_not_met

# Numbers the process groups of this process, one for each run of a sweep.
_opened = itertools.count()


@dataclass(frozen=True)
class Device:
    """Describes where a run computes.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        torch_device: this process's device.
        dtype: the dtype of parameters and activations.
        threads: compute threads of this process (CPU).
        hardware: the hardware in one line, for people.
    """

    kind: str
    torch_device: torch.device
    dtype: torch.dtype
    threads: int
    hardware: str

    def synchronize(self) -> None:
        """Waits until all work given to the device is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize()


def numbers_on(device: torch.device, *numbers: float) -> torch.Tensor:
    """Returns fp32 ``[len(numbers)]`` on ``device``; unlike with ``torch.tensor``, nobody waits."""
    made = torch.zeros(len(numbers), device=device)
    for place, number in enumerate(numbers):
        if number:
            made[place].fill_(number)
    return made


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def choose_kind(config: DeviceConfig) -> str:
    """Returns ``cuda`` or ``cpu``; ``auto`` takes CUDA when there is a GPU.

    Raises:
        ValueError: when CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.kind == "cuda" and not available:
        raise ValueError(
            "device.kind: cuda was asked for, but torch sees no GPU; use device.kind=cpu"
        )
    if config.kind == "auto":
        return "cuda" if available else "cpu"
    return config.kind


def import_megatron_for(kind: str) -> None:
    """Imports megatron-core for ``cuda`` or ``cpu``. No device is opened.

    Raises:
        ValueError: for a Transformer Engine that cannot be imported.
    """
    if kind == "cpu":
        install_cpu_backend()
        return
    have_transformer_engine()  # raises where it is broken
    import_megatron(compile_fused=True)
    fuse_gradient_norm()


def open_device(config: DeviceConfig, world: World) -> Device:
    """Takes this process's device and imports megatron-core for it.

    It must be called before any megatron import.

    Raises:
        ValueError: when CUDA is asked for and there is none, too few GPUs for the processes of
            this machine, or a Transformer Engine that cannot be imported.
    """
    kind = choose_kind(config)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = dtypes.get(config.dtype, torch.bfloat16 if kind == "cuda" else torch.float32)
    if kind == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"device.kind: {counted(world.local_size, 'process')} on this machine but "
                f"{counted(torch.cuda.device_count(), 'GPU')}; start fewer with --nproc-per-node"
            )
        have_transformer_engine()  # one that is broken is told before anything is opened
        torch.cuda.set_device(world.local_rank)
        import_megatron_for(kind)
        name = torch.cuda.get_device_name()
        device = torch.device("cuda", world.local_rank)
        return Device("cuda", device, dtype, torch.get_num_threads(), f"{world.size} x {name}")
    cores = os.cpu_count() or 1
    threads = config.threads or max(1, cores // world.local_size)
    torch.set_num_threads(threads)
    keep_freed_memory()
    import_megatron_for(kind)
    processes = f"{counted(world.size, 'process')} of {counted(threads, 'thread')}"
    hardware = f"{_cpu_name()}, {counted(cores, 'core')}, {processes}"
    return Device("cpu", torch.device("cpu"), dtype, threads, hardware)


def connects_at_once(device: Device, world: World) -> bool:
    """Returns whether each process group makes its NCCL communicator when the group is made.

    On one machine that is quick, and tells of a broken link before training. megatron-core makes
    groups that nothing uses, and each rank makes those of all others: their number grows with the
    world (docs/gpu.md), and connecting each would take minutes over several machines. There a
    communicator is made when it is first used.
    """
    return device.kind == "cuda" and world.size == world.local_size


def open_process_group(device: Device, world: World, timeout_seconds: int) -> None:
    """Joins the run's process group: NCCL on CUDA, gloo on CPU. One process needs no launcher.

    Raises:
        HelperError: this rank cannot meet the others: its port is taken, or nobody answers there.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.kind == "cuda" else "gloo"
    device_id = device.torch_device if connects_at_once(device, world) else None
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timeout,
            device_id=device_id,
        )
        return
    try:
        store, rank, size = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    except dist.DistNetworkError as error:
        raise HelperError(why_not_met(error, os.environ.get("MASTER_PORT", ""))) from None
    store.set_timeout(timeout)
    # torchrun's store outlives a run: the next one of a sweep would find its addresses there.
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"run_{next(_opened)}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device_id,
    )
