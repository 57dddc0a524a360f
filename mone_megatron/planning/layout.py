"""Says where a rank stands in a layout and which ranks it works with, in megatron-core's numbering.

Outside the experts tensor parallelism is innermost, then context, data and pipeline parallelism;
inside them expert-tensor, expert, expert-data and pipeline parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import ParallelConfig


@dataclass(frozen=True)
class Place:
    """Holds the coordinates of one rank in the groups of a layout."""

    tensor: int
    context: int
    data: int
    expert_tensor: int
    expert: int
    expert_data: int
    pipeline: int

    def __str__(self) -> str:
        return (
            f"pipeline {self.pipeline}, data {self.data}, context {self.context}, "
            f"tensor {self.tensor}; experts: data {self.expert_data}, expert {self.expert}, "
            f"tensor {self.expert_tensor}"
        )


def place_of(rank: int, parallel: ParallelConfig, layout: Layout) -> Place:
    """Returns where ``rank`` stands."""
    stage = layout.world_size // parallel.pipeline
    inside = rank % stage
    rest, tensor = divmod(inside, parallel.tensor)
    data, context = divmod(rest, parallel.context)
    experts, expert_tensor = divmod(inside, parallel.expert_tensor)
    expert_data, expert = divmod(experts, parallel.expert)
    return Place(tensor, context, data, expert_tensor, expert, expert_data, rank // stage)


def experts_are_dense_like(parallel: ParallelConfig) -> bool:
    """Returns whether experts are replicated like dense weights and share their buffers."""
    return parallel.expert == 1 and parallel.expert_tensor == parallel.tensor


@dataclass(frozen=True)
class Group:
    """Describes ranks that communicate: how many they are, and the distance between neighbours."""

    name: str
    size: int
    stride: int

    def in_node(self, gpus_per_node: int) -> int:
        """Returns how many of its ranks share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


def groups(parallel: ParallelConfig, layout: Layout) -> dict[str, Group]:
    """Returns the groups of a layout by name, those of one rank included."""
    batch = parallel.tensor * parallel.context
    experts = parallel.expert * parallel.expert_tensor
    found = [
        Group("tensor", parallel.tensor, 1),
        Group("context", parallel.context, parallel.tensor),
        # The distributed optimizer shards over context-parallel ranks, too.
        Group("data", layout.data * parallel.context, parallel.tensor),
        Group("pipeline", parallel.pipeline, layout.world_size // parallel.pipeline),
        Group("expert_tensor", parallel.expert_tensor, 1),
        Group("expert", parallel.expert, parallel.expert_tensor),
        # What the allgather dispatcher gathers over.
        Group("expert_and_tensor", experts, 1),
        Group("expert_data", layout.expert_data, experts),
    ]
    assert batch * layout.data * parallel.pipeline == layout.world_size
    return {group.name: group for group in found}
