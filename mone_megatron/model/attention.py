"""Computes core attention by ``torch.nn.functional.scaled_dot_product_attention``.

megatron-core's own, without Transformer Engine, builds the whole score matrix. Short sequences in
fp32 on a CPU have a faster way (:mod:`mone_megatron.kernels.attention_cpu`).

Shape suffixes: S sequence, B batch, N query heads of this rank, G key/value heads of this rank,
D head dimension, E of a value head, W the wider of the two, K keys (with context parallelism those
of all its ranks).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mone_megatron.kernels import attention_cpu
from mone_megatron.mone.megatron_settings import CORE_ATTENTION, refuse_unread

# Widths of heads that fused kernels take are multiples of this.
_WIDTH_STEP = 8


def is_windowed(config: TransformerConfig, layer_number: int) -> bool:
    """Returns whether a layer (from 1) attends within the window; megatron-core's rule."""
    if config.window_size is None:
        return False
    skip = config.window_attn_skip_freq
    if skip is None:
        return True
    if isinstance(skip, int):
        return layer_number % skip != 0
    return bool(skip[layer_number - 1])


def context_positions(length: int, ranks: int) -> Tensor:
    """Returns where the tokens of each context-parallel rank stand, ``[ranks, length]``, int64.

    megatron-core cuts a sequence into twice as many chunks as ranks, and rank r takes chunk r and
    the one that is as far from the end, so that all have the same work under a causal mask.

    Args:
        length: how many tokens of a sequence one rank has.
        ranks: the context-parallel size.
    """
    chunks = torch.arange(length * ranks).view(2 * ranks, -1)
    order = torch.arange(ranks)
    return torch.cat([chunks[order], chunks[2 * ranks - 1 - order]], dim=1)


class SDPAttention(MegatronModule):
    """Is causal self-attention of the heads of this rank.

    It can stay within a window, within documents, and have a sink: a logit of its own in each
    softmax, which takes weight and gives nothing (``softmax_type``: ``off-by-one`` is a logit of 0,
    ``learnable`` one for each head). With context parallelism each rank gathers the keys and values
    of all (:func:`context_positions` says where its own tokens stand).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the arguments that megatron-core constructs core attention modules with.

        Raises:
            ValueError: for a mask other than causal, or settings that it does not read (fp8, ...).
        """
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"SDPAttention is causal; the layer asks for {attn_mask_type}")
        refuse_unread("SDPAttention", config, CORE_ATTENTION)
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # Earlier keys that a query sees beside its own.
        self.window: int | None = None
        if is_windowed(config, layer_number):
            assert config.window_size is not None
            before, after = config.window_size
            if after != 0 or before < 0:
                raise ValueError(
                    f"SDPAttention is causal; window_size={config.window_size} is not (N, 0)"
                )
            self.window = before
        self.context_group = None
        if config.context_parallel_size > 1:
            self.context_group = (
                parallel_state.get_context_parallel_group()
                if pg_collection is None
                else pg_collection.cp
            )
        if config.softmax_type not in ("vanilla", "off-by-one", "learnable"):
            raise ValueError(f"SDPAttention does not compute softmax_type={config.softmax_type!r}")
        if config.softmax_type == "learnable":
            self._add_sink_parameter(
                config.num_attention_heads // config.tensor_model_parallel_size
            )

    def _add_sink_parameter(self, heads: int) -> None:
        """Makes the logits of this rank's heads; initialised like every weight."""
        device = torch.device("cpu")
        if not self.config.use_cpu_initialization:
            device = torch.device("cuda", torch.cuda.current_device())
        dtype = self.config.params_dtype
        self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=dtype, device=device))
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ShardedStateDict:
        """Returns the learnt sinks for a checkpoint, cut by heads; empty when there are none."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets
        )
        return sharded

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the attention of this rank's heads.

        Args:
            query: the queries, ``[S, B, N, D]``.
            key: the keys, ``[S, B, G, D]``.
            value: the values, ``[S, B, G, E]``.
            attention_mask: the document of each token, ``[B, K]`` int64, in the order of the
                sequence (:mod:`mone_megatron.data.apart`): tokens see their own document only.
                None lets them see all before them.
            attn_mask_type: ignored, the mask is causal.
            kwargs: megatron-core's other arguments; packed sequences and biases are refused.

        Returns:
            ``[S, B, N * E]``.
        """
        assert all(argument is None for argument in kwargs.values()), kwargs
        if self.context_group is not None:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.context_group)
                for x in (key, value)
            )
        head_dim, value_dim = query.shape[-1], value.shape[-1]
        scale = head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        dropout = self.dropout if self.training else 0.0
        mask_B1SK = self._mask(attention_mask, query.shape[0], query.device)
        sink_N = self._sink(query)
        plain = mask_B1SK is None and sink_N is None and not dropout
        if plain and attention_cpu.supports(query, key, value):
            return attention_cpu.causal_attention(query, key, value, scale)
        query_BNSD, key_BGKD, value_BGKE = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # Flash attention takes heads of one width. Zeros change neither scores nor values.
        wide = max(head_dim, value_dim)
        if sink_N is not None:
            wide = -(-(wide + 1) // _WIDTH_STEP) * _WIDTH_STEP
        query_BNSW, key_BGKW, value_BGKW = (
            F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x
            for x in (query_BNSD, key_BGKD, value_BGKE)
        )
        if sink_N is not None:
            query_BNSW, key_BGKW, value_BGKW = _with_sink(
                query_BNSW, key_BGKW, value_BGKW, sink_N / scale
            )
            if mask_B1SK is not None:
                # The sink is seen by all, and by the query before the first, which is dropped.
                mask_B1SK = F.pad(mask_B1SK, (1, 0, 1, 0), value=True)

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                query_BNSW,
                key_BGKW,
                value_BGKW,
                attn_mask=mask_B1SK,
                dropout_p=dropout,
                is_causal=mask_B1SK is None,
                scale=scale,
                enable_gqa=query_BNSD.shape[1] != key_BGKD.shape[1],
            )

        if dropout and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so their dropout must too.
            with get_cuda_rng_tracker().fork():
                context_BNSW = attend()
        else:
            context_BNSW = attend()
        if sink_N is not None:
            context_BNSW = context_BNSW[:, :, 1:]
        return context_BNSW[..., :value_dim].permute(2, 0, 1, 3).flatten(2)

    @property
    def plain(self) -> bool:
        """Returns whether, without a mask, this is causal attention and nothing else."""
        limited = self.window is not None or self.context_group is not None
        dropping = self.training and self.dropout
        return not limited and not dropping and self.config.softmax_type == "vanilla"

    def _sink(self, query_SBND: Tensor) -> Tensor | None:
        if self.config.softmax_type == "vanilla":
            return None
        if self.config.softmax_type == "learnable":
            return self.softmax_offset
        return query_SBND.new_zeros(query_SBND.shape[2])

    def _mask(self, document_BK: Tensor | None, length: int, device: torch.device) -> Tensor | None:
        """Returns which keys each query sees, bool ``[B, 1, S, K]``; None for all before it."""
        if document_BK is None and self.window is None and self.context_group is None:
            return None
        if self.context_group is None:
            at_K = at_S = torch.arange(length, device=device)
        else:
            at_RS = context_positions(length, self.context_group.size()).to(device)
            at_K, at_S = at_RS.flatten(), at_RS[self.context_group.rank()]
        apart_SK = at_S[:, None] - at_K[None, :]
        seen_BSK = (apart_SK >= 0)[None]
        if self.window is not None:
            seen_BSK = seen_BSK & (apart_SK <= self.window)
        if document_BK is not None:
            seen_BSK = seen_BSK & (document_BK[:, at_S, None] == document_BK[:, None, at_K])
        return seen_BSK[:, None]


def _with_sink(
    query_BNSW: Tensor, key_BGKW: Tensor, value_BGKW: Tensor, sink_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts a key before the first whose score is each head's sink, and whose value is zero.

    The last element of a head, which is free, is the sink in queries and 1 in that key. A query
    goes before the first, too, so that the causal mask stays one.
    """
    query_BNSW = torch.cat(
        [
            query_BNSW[..., :-1],
            sink_N.to(query_BNSW.dtype)
            .view(1, -1, 1, 1)
            .expand(query_BNSW.shape[0], -1, query_BNSW.shape[2], 1),
        ],
        dim=-1,
    )
    key_of_sink = F.pad(key_BGKW.new_ones(*key_BGKW.shape[:2], 1, 1), (key_BGKW.shape[-1] - 1, 0))
    return (
        F.pad(query_BNSW, (0, 0, 1, 0)),
        torch.cat([key_of_sink, key_BGKW], dim=2),
        F.pad(value_BGKW, (0, 0, 1, 0)),
    )
