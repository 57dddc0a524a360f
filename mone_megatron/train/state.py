"""What training changes: the model, the optimizer and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.model.builder import build_model
from mone_megatron.parallel.device import Device
from mone_megatron.parallel.groups import open_expert_sources
from mone_megatron.train.optimizer import build_optimizer, build_scheduler


@dataclass(frozen=True)
class TrainingState:
    """Holds this rank's part of what training changes."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build_state(config: Config, layout: Layout, device: Device, vocab_size: int) -> TrainingState:
    """Builds it as it is before the first step. Collective; the process groups are open."""
    chunks = build_model(
        config,
        device=device,
        vocab_size=vocab_size,
        sequence_parallel=layout.sequence_parallel,
        sources=open_expert_sources(config.parallel),
    )
    optimizer = build_optimizer(config, device, chunks)
    return TrainingState(chunks, optimizer, build_scheduler(config, optimizer))
