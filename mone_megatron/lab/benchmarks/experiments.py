"""Builds a trainer's parts without its loop: benchmarks of whole steps drive them themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.data.datasets import build_datasets
from mone_megatron.data.loader import MicrobatchSampler, build_loader
from mone_megatron.data.prepare import PreparedData, prepare_data
from mone_megatron.parallel.device import Device, open_device
from mone_megatron.parallel.groups import open_groups
from mone_megatron.parallel.world import World
from mone_megatron.train.hooks.auxiliary_losses import AuxiliaryLossHook
from mone_megatron.train.state import TrainingState, build_state
from mone_megatron.train.step import Batch, Stepper


@dataclass
class OpenExperiment:
    """Holds one experiment, ready to step, with its microbatches in memory."""

    config: Config
    layout: Layout
    device: Device
    data: PreparedData
    state: TrainingState
    # This rank's microbatches of a few steps, over and over.
    batches: Iterator[Batch]

    def stepper(self) -> Stepper:
        """Returns the trainer's step over these objects."""
        return Stepper(self.config, self.layout, self.device, self.state)

    def next_step(self) -> list[Batch]:
        """Returns the microbatches of one step."""
        return list(itertools.islice(self.batches, self.layout.num_microbatches))


def open_experiments(configs: Sequence[Config], *, steps_in_memory: int) -> list[OpenExperiment]:
    """Builds experiments of one layout beside each other in this process.

    Collective over the default process group, which is initialised and has no other groups yet.

    Args:
        configs: from :func:`mone_megatron.lab.benchmarks.ranks.prepare`, of one layout.
        steps_in_memory: how many steps' data to load.
    """
    assert all(config.parallel == configs[0].parallel for config in configs)
    world = World.from_environment() if configs[0].device.kind == "cuda" else _gloo_world()
    # Each with its own dtype; opening a device again changes nothing.
    devices = [open_device(config.device, world) for config in configs]
    open_groups(configs[0].parallel, configs[0].train, timeout_seconds=600)
    return [
        _open(config, device, world, steps_in_memory)
        for config, device in zip(configs, devices, strict=True)
    ]


def _gloo_world() -> World:
    """Returns this process's place among the ranks that a benchmark started on this machine."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size)


def _open(config: Config, device: Device, world: World, steps: int) -> OpenExperiment:
    devices = torch.cuda.device_count() if device.kind == "cuda" else 0
    layout = validate(
        config, world_size=world.size, num_devices=devices, local_world_size=world.local_size
    )
    data = prepare_data(config)
    train, _ = build_datasets(
        config,
        data,
        num_train_samples=steps * config.train.global_batch_size,
        num_valid_samples=0,
        build_here=True,
    )
    assert train is not None
    sampler = MicrobatchSampler(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=layout.data,
        start_step=0,
        end_step=steps,
    )
    batches = list(build_loader(train, sampler, num_workers=0, pin=False))
    state = build_state(config, layout, device, data.vocab_size)
    return OpenExperiment(config, layout, device, data, state, itertools.cycle(batches))


def step_action(session: OpenExperiment) -> Iterator[None]:
    """Trains one step at each ``next``, auxiliary losses read as the trainer does.

    A step has ended when it is yielded, on a GPU, too.
    """
    stepper = session.stepper()
    auxiliary = AuxiliaryLossHook(session.config, session.layout, session.device.torch_device)
    while True:
        stepper.train(session.next_step(), reduce=auxiliary.reduce)
        session.device.synchronize()
        yield
