"""Small models of the exported class, every choice that it makes in one of them."""

from __future__ import annotations

from typing import Any

import torch
from hf_models import VOCABULARY

from mone_megatron.hf import MoneConfig, MoneForCausalLM

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "mone": {"keep_ratio": 0.25},
}
# Every choice that the class makes, each in one of these.
VARIANTS = {
    "plain": {},
    "all": {
        "qk_norm": "all_heads",
        "qkv_bias": True,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gate": True,
        "router_score_function": "sigmoid",
        "router_bias": True,
        "router_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
        "mlp_only_layers": [0],
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
        "mone": {"keep_ratio": 0.25, "apply_to": ["routed", "shared", "dense"]},
    },
    "latent": {
        "attention_type": "mla",
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "norm_topk_prob": False,
    },
}


def build(variant: str, **changes: Any) -> MoneForCausalLM:
    """One of them, random, ready to evaluate."""
    torch.manual_seed(3)
    return MoneForCausalLM(MoneConfig(**_SHAPE | VARIANTS[variant] | changes)).eval()
