"""torch RMSNorm under megatron-core's constructor, with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension.

    megatron-core's torch norm refuses sequence parallelism, which MoE with tensor parallelism
    needs; all it takes is to mark the weight, whose gradient is then summed over the
    tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> None:
        """As megatron-core constructs norms."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
