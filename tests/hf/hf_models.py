"""Small random models of the true transformers classes, saved as their users find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 320
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Wide enough that logits and scores are far from zero.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
# Name -> (model type, settings beyond _COMMON).
MOES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", _EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe_dense_first": (
        "qwen3_moe",
        _EXPERTS | {"mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        _EXPERTS | {"shared_expert_intermediate_size": 24, "sliding_window": None},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2_lite": (
        "deepseek_v2",
        _LATENT | {"q_lora_rank": None, "rope_parameters": _YARN},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"q_lora_rank": 24}),
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
ALL = MOES | DENSE


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """One of the models above, every weight random."""
    model_type, settings = ALL[name]
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **_COMMON | settings | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases, too: ones and zeros would hide a mistake.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def save_model(name: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Save one with a tokenizer, as its users download it."""
    random_model(name, **changes).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
