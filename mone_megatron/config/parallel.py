"""Defines the group ``parallel``: how the model is spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast


@dataclass(frozen=True)
class ParallelConfig(Group):
    """Says how the model is spread over processes; the data-parallel size is what is left."""

    tensor: Annotated[int, AtLeast(1)] = 1
    """Tensor parallelism outside the experts (with sequence parallelism)."""
    pipeline: Annotated[int, AtLeast(1)] = 1
    """Pipeline stages."""
    virtual_pipeline: Annotated[int, AtLeast(1)] = 1
    """Model chunks per pipeline rank; more than 1 interleaves the pipeline."""
    context: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each sequence; each gathers the keys and values of all."""
    expert: Annotated[int, AtLeast(1)] = 1
    """Expert parallelism: processes that share the experts of a layer."""
    expert_tensor: Annotated[int, AtLeast(1)] = 1
    """Tensor parallelism inside the experts."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach their experts; `flex` needs CUDA and DeepEP."""
    distributed_optimizer: bool = True
    """Shards optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlaps the reduction of gradients with computation (CUDA)."""
    overlap_param_gather: bool = False
    """Overlaps the gathering of parameters with computation (CUDA)."""

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            yield (
                f"parallel.virtual_pipeline: {self.virtual_pipeline} interleaves a pipeline and "
                "parallel.pipeline=1; use parallel.virtual_pipeline=1, or parallel.pipeline=2 or "
                "more"
            )
        if self.dispatcher == "flex" and self.expert * self.expert_tensor == 1:
            yield (
                "parallel.dispatcher: flex needs parallel.expert*expert_tensor above 1; "
                "use alltoall"
            )
        if self.overlap_param_gather and not self.distributed_optimizer:
            yield (
                "parallel.overlap_param_gather: needs parallel.distributed_optimizer=true; "
                "set it, or parallel.overlap_param_gather=false"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield (
                "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce=true; "
                "set it, or parallel.overlap_param_gather=false"
            )
