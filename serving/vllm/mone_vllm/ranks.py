"""Describes the ranks of vLLM's tensor parallelism, which hold slices of the same experts."""

from __future__ import annotations

from torch import Tensor
from vllm.distributed import get_tp_group


class TensorParallelRanks:
    """Stands for every rank of the tensor parallel group, in the order of the neurons."""

    @property
    def rank(self) -> int:
        """Returns this rank's place among them."""
        return int(get_tp_group().rank_in_group)

    @property
    def size(self) -> int:
        """Returns how many ranks there are."""
        return int(get_tp_group().world_size)

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum over the ranks. Collective."""
        total: Tensor = get_tp_group().all_reduce(part)
        return total

    def gather(self, part_TF: Tensor) -> Tensor:
        """Returns all ranks' columns side by side. Collective."""
        everyone: Tensor = get_tp_group().all_gather(part_TF.contiguous(), dim=-1)
        return everyone
