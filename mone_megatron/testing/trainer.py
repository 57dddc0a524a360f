"""Builds the parts of a trainer on this rank, for tests that look inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from mone_megatron.config.layout import Layout
from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.data.loader import MicrobatchSampler
from mone_megatron.parallel.device import Device
from mone_megatron.parallel.groups import open_groups
from mone_megatron.train.resume.checkpointer import Checkpointer
from mone_megatron.train.resume.identity import run_identity
from mone_megatron.train.state import TrainingState, build_state
from mone_megatron.train.step import Batch, Stepper

VOCABULARY = 512


@dataclass(frozen=True)
class Trainer:
    """Holds what :func:`mone_megatron.train.run.run` builds, without data or hooks."""

    config: Config
    layout: Layout
    state: TrainingState
    stepper: Stepper
    checkpointer: Checkpointer

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """Returns this rank's part of the model."""
        return self.state.chunks


def build_trainer(
    overrides: Sequence[str],
    *,
    data_fingerprint: str | None = None,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda message: None,
) -> Trainer:
    """Composes, validates and builds on the CPU; ``torch.distributed`` must be initialised.

    Args:
        overrides: Hydra's.
        data_fingerprint: what checkpoints are checked against; None takes the configured data's.
        dtype: of parameters and activations.
        say: takes what the checkpointer tells.
    """
    from mone_megatron.data.prepare import prepare_data

    config = compose(overrides)
    layout = validate(config, world_size=dist.get_world_size())
    if data_fingerprint is None:
        data_fingerprint = prepare_data(config).fingerprint
    device = Device("cpu", torch.device("cpu"), dtype, 1, "")
    open_groups(config.parallel, config.train, timeout_seconds=300)
    state = build_state(config, layout, device, VOCABULARY)
    identity = run_identity(
        config, data_fingerprint=data_fingerprint, vocab_size=VOCABULARY, dtype=device.dtype
    )
    checkpointer = Checkpointer(
        config,
        identity=identity,
        state=state,
        tokenizer_dir=None,
        say=say,
    )
    stepper = Stepper(config, layout, device, state)
    return Trainer(config, layout, state, stepper, checkpointer)


def random_batches(trainer: Trainer) -> list[Batch]:
    """Returns this rank's microbatches of one step of random tokens, which is the same step in
    every layout.
    """
    train = trainer.config.train
    generator = torch.Generator().manual_seed(3)
    size = (train.global_batch_size, train.seq_length + 1)
    samples = torch.randint(VOCABULARY - 12, size, generator=generator)
    sampler = MicrobatchSampler(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=trainer.layout.data,
        start_step=0,
        end_step=1,
    )
    return [
        {
            "tokens": samples[rows, :-1],
            "labels": samples[rows, 1:],
            "loss_mask": torch.ones(len(rows), train.seq_length),
            "position_ids": torch.arange(train.seq_length).expand(len(rows), -1),
        }
        for rows in sampler
    ]
