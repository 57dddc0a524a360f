"""Reads ``config.json`` of an export for vLLM, without running code that lies beside it."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

from mone_vllm.versions import unsupported_vllm


class MoneConfig(Qwen3MoeConfig):
    """Is a Qwen3-MoE configuration with what our family adds to it (hf/configuration_mone.py)."""

    model_type = "mone"

    mone: dict | None = None
    attention_type: str = "gqa"
    qk_norm: str = "head"
    qkv_bias: bool = False
    rectified_up: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_kind: str = "topk"
    router_score_function: str = "softmax"
    router_bias: bool = False
    router_scaling_factor: float = 1.0
    n_group: int = 0
    topk_group: int = 0
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives what is left out.

        Raises:
            ValueError: the installed vLLM is not supported.
        """
        if reason := unsupported_vllm():
            raise ValueError(reason)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
