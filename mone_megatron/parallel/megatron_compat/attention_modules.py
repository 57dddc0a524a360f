"""Has megatron-core's attention keep the projections and norms that a spec names."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any


@functools.cache
def self_attention() -> type:
    """Returns megatron-core's self-attention, which takes the norms of queries and keys of a spec.

    From 0.18 on it refuses them without ``qk_layernorm=True``; but that adds the gradients of both
    norms up over tensor-parallel ranks, which is wrong where their weights are split over them.
    """
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    class SpecifiedSelfAttention(SelfAttention):
        """Is megatron-core's, with the norms of queries and keys that its spec names."""

        def __init__(
            self, config: TransformerConfig, submodules: SelfAttentionSubmodules, **more: Any
        ) -> None:
            norms = submodules.q_layernorm, submodules.k_layernorm
            if config.qk_layernorm or norms == (IdentityOp, IdentityOp):
                super().__init__(config, submodules, **more)
                return
            plain = replace(submodules, q_layernorm=IdentityOp, k_layernorm=IdentityOp)
            super().__init__(config, plain, **more)
            self.q_layernorm, self.k_layernorm = (
                build_module(
                    norm,
                    hidden_size=self.hidden_size_per_attention_head,
                    config=self.config,
                    eps=self.config.layernorm_epsilon,
                )
                for norm in norms
            )

    return SpecifiedSelfAttention


@functools.cache
def latent_attention() -> type:
    """Returns megatron-core's multi-latent attention, with the modules that its spec names.

    From 0.18 on it takes others in place of what stands there, which need Transformer Engine or
    norm queries that have no latent; and without ``qk_layernorm`` it refuses norms.
    """
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import (
        MLASelfAttention,
        MLASelfAttentionSubmodules,
    )

    class SpecifiedLatentAttention(MLASelfAttention):
        """Is megatron-core's, with the projections and norms that its spec names."""

        def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
            names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
            norms = ("q_layernorm", "kv_layernorm")
            return {name: getattr(submodules, name) or IdentityOp for name in (*names, *norms)}

    return SpecifiedLatentAttention
