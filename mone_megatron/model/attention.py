"""Core attention on ``torch.nn.functional.scaled_dot_product_attention``.

megatron-core's own, without Transformer Engine, builds the whole score matrix.

Shape suffixes: S sequence, B batch, N query heads of this rank, G key/value heads of this rank,
D head dimension, E of a value head, W the wider of the two.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.mone.megatron_settings import CORE_ATTENTION, refuse_unread


class SDPAttention(MegatronModule):
    """Causal self-attention of the heads of this rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        """As megatron-core constructs core attention modules.

        Raises:
            ValueError: for a mask other than causal, context parallelism, or settings that it does
                not read (windows, learnt offsets of the softmax, fp8, ...).
        """
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"SDPAttention is causal; the layer asks for {attn_mask_type}")
        refuse_unread("SDPAttention", config, CORE_ATTENTION)
        if config.context_parallel_size > 1:
            raise ValueError("parallel.context: needs Transformer Engine; use parallel.context=1")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[S, B, N, D]``.
            key: ``[S, B, G, D]``.
            value: ``[S, B, G, E]``.
            attention_mask: ignored, the mask is causal.
            attn_mask_type: ignored likewise.
            kwargs: megatron-core's other arguments; packed sequences and biases are refused.

        Returns:
            ``[S, B, N * E]``.
        """
        assert all(argument is None for argument in kwargs.values()), kwargs
        query_BNSD, key_BGSD, value_BGSE = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # Flash attention takes heads of one width. Zeros change neither scores nor values.
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        wide = max(head_dim, value_dim)
        query_BNSW, key_BGSW, value_BGSW = (
            F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x
            for x in (query_BNSD, key_BGSD, value_BGSE)
        )
        scale = head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        dropout = self.dropout if self.training else 0.0

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                query_BNSW,
                key_BGSW,
                value_BGSW,
                dropout_p=dropout,
                is_causal=True,
                scale=scale,
                enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
            )

        if dropout and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so their dropout must too.
            with get_cuda_rng_tracker().fork():
                context_BNSW = attend()
        else:
            context_BNSW = attend()
        return context_BNSW[..., :value_dim].permute(2, 0, 1, 3).flatten(2)
