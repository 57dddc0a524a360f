"""Derives how the processes of a run are used from the configuration, which never says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mone_megatron.config.parallel import ParallelConfig
from mone_megatron.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """Describes how the processes of a run are used.

    Attributes:
        world_size: the number of processes in all.
        data: data-parallel replicas of everything outside the experts.
        expert_data: data-parallel replicas of each expert shard.
        num_microbatches: forward passes of each data-parallel rank in one step.
        sequence_parallel: whether activations between layers are sharded along the sequence over
            the tensor-parallel ranks.
    """

    world_size: int
    data: int
    expert_data: int
    num_microbatches: int
    sequence_parallel: bool

    @classmethod
    def of(cls, config: Config, world_size: int) -> Layout:
        """Returns the layout of a configuration that ``validate`` has passed."""
        parallel, train = config.parallel, config.train
        data = world_size // model_parallel_size(parallel)
        return cls(
            world_size=world_size,
            data=data,
            expert_data=world_size // expert_parallel_size(parallel),
            num_microbatches=train.global_batch_size // (train.micro_batch_size * data),
            sequence_parallel=parallel.tensor > 1,
        )


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Returns how many processes hold one copy of everything outside the experts."""
    return parallel.tensor * parallel.pipeline * parallel.context


def expert_parallel_size(parallel: ParallelConfig) -> int:
    """Returns how many processes hold one copy of all experts."""
    return parallel.expert * parallel.expert_tensor * parallel.pipeline


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Returns the fewest processes that the layout can run on; others are multiples of it."""
    return math.lcm(model_parallel_size(parallel), expert_parallel_size(parallel))
