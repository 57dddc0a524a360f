"""Defines RMSNorms with megatron-core's constructor that work with sequence parallelism.

Shape suffixes: S sequence, B batch, N heads of this rank, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from mone_megatron.kernels import rms_norm_cpu
from mone_megatron.mone.megatron_settings import NORM, refuse_unread


class RMSNorm(torch.nn.RMSNorm):
    """Is torch's RMSNorm over the last dimension.

    megatron-core's torch norm refuses sequence parallelism, which MoE with tensor parallelism
    needs; all it takes is to mark the weight, whose gradient is then summed over the
    tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        """Takes the arguments that megatron-core constructs norms with.

        Raises:
            ValueError: for settings that it does not read.
        """
        refuse_unread("RMSNorm", config, NORM)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        assert self.eps is not None
        if rms_norm_cpu.supports(x, self.weight):
            return rms_norm_cpu.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


class AllHeadsRMSNorm(torch.nn.Module):
    """Normalises queries or keys over all heads together (OLMoE), with a weight for every value.

    Heads are split over the tensor-parallel ranks, and the weight with them; the sum of squares is
    added up over the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        **kwargs: Any,
    ) -> None:
        """Takes what megatron-core gives the norms of queries and keys.

        Args:
            config: megatron-core's configuration of the model.
            hidden_size: D, the dimension of one head.
            eps: added to the mean square.
            num_heads: the heads of all tensor-parallel ranks.
            kwargs: megatron-core's other arguments.

        Raises:
            ValueError: for settings that it does not read.
        """
        refuse_unread("AllHeadsRMSNorm", config, NORM)
        super().__init__()
        self.eps = eps
        self.width = num_heads * hidden_size
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        weight = torch.ones(divide(self.width, self.tp_group.size()), dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads_SBND: Tensor) -> Tensor:
        """Normalises this rank's heads, ``[S, B, N, D]``, by the mean square of all heads."""
        if self.tp_group.size() == 1:
            joined = heads_SBND.flatten(2)
            if rms_norm_cpu.supports(joined, self.weight):
                return rms_norm_cpu.rms_norm(joined, self.weight, self.eps).view_as(heads_SBND)
            return F.rms_norm(joined, (self.width,), self.weight, self.eps).view_as(heads_SBND)
        wide_SBND = heads_SBND.float()
        squares = wide_SBND.square().sum((2, 3), keepdim=True)
        # Every rank's output depends on the sum: it is added up forward, its gradient backward.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, self.tp_group), self.tp_group
        )
        normed_SBND = wide_SBND * torch.rsqrt(squares / self.width + self.eps)
        return self.weight.view(heads_SBND.shape[2:]) * normed_SBND.to(heads_SBND.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Returns the weight as a global tensor, which any layout can load.

        It is ``[num_heads * D]``, in the order of the heads.
        """
        state_dict = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state_dict, prefix, {"weight": 0}, sharded_offsets
        )
