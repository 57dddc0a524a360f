"""Has self-attention compute all between its two projections at once, where a kernel does so.

megatron-core cuts the projections into queries, keys and values, and normalises, rotates and weighs
them one after the other. On a CPU in fp32 one kernel does so
(:mod:`mone_megatron.kernels.attention_cpu`).

Shape suffixes: S sequence, B batch, H hidden size, P projections of all heads of this rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from torch import Tensor

from mone_megatron.kernels.attention_cpu import Heads, attention_of_projections, makes_heads
from mone_megatron.model.attention import SDPAttention
from mone_megatron.model.norm import RMSNorm
from mone_megatron.module_calls import calls_only
from mone_megatron.parallel.megatron_compat.attention_modules import self_attention


class SelfAttention(self_attention()):  # type: ignore[misc]
    """Is megatron-core's self-attention, with a shorter way where all of it is usual."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more: Any, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output projection and its bias, as megatron-core's does.

        Args:
            hidden_states: ``[S, B, H]``.
            attention_mask: None for the shorter way.
            more: none for the shorter way.
            given: megatron-core's other arguments; of them, for the shorter way, the angles of
                rotation only.
        """
        angles = given.get("rotary_pos_emb")
        others = any(value is not None for name, value in given.items() if name != "rotary_pos_emb")
        if attention_mask is None and not more and not others and isinstance(angles, Tensor):
            heads = self._heads()
            if heads is not None:
                weights = self.q_layernorm.weight, self.k_layernorm.weight
                if makes_heads(hidden_states, *weights, angles):
                    mixed_SBP, _ = self.linear_qkv(hidden_states)
                    context = attention_of_projections(mixed_SBP, *weights, angles, heads)
                    output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
                    return output
        return super().forward(hidden_states, attention_mask, *more, **given)

    def _heads(self) -> Heads | None:
        """Returns how heads are made of projections; None where megatron-core is to make them."""
        config, norms, core = self.config, (self.q_layernorm, self.k_layernorm), self.core_attention
        usual = (
            calls_only(core, SDPAttention)
            and core.plain
            and all(calls_only(norm, RMSNorm) for norm in norms)
            and not (self.training and self.checkpoint_core_attention)
            and not (config.no_rope_freq or config.rotary_interleaved or config.test_mode)
            # Heads that ranks share are gathered; gates are heads, too.
            and config.num_query_groups >= self.world_size
            and not vars(config).get("attention_output_gate")
            and _yarn_get_concentration_factor_from_config(config) == 1.0
        )
        if not usual:
            return None
        width = self.hidden_size_per_attention_head
        return Heads(
            per_key=self.num_attention_heads_per_partition // self.num_query_groups_per_partition,
            query_eps=self.q_layernorm.eps,
            key_eps=self.k_layernorm.eps,
            scale=width**-0.5 if core.softmax_scale is None else core.softmax_scale,
        )
