"""megatron-core's refusals in the words of our configuration.

:mod:`mone_megatron.config.validate` refuses what megatron-core would, with our keys and before
anything starts. What it does not know of (a rule of another release) is translated here, so that no
user is told to set an option of another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mone_megatron.config.errors import ConfigError

# Their field (an option of their command line is the same with dashes) -> our key.
_KEYS: dict[str, str] = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "num_query_groups": "model.num_query_groups",
    "kv_channels": "model.head_dim",
    "ffn_hidden_size": "model.dense_ffn_hidden_size",
    "num_moe_experts": "model.num_experts",
    "num_experts": "model.num_experts",
    "moe_router_topk": "model.experts_per_token",
    "moe_ffn_hidden_size": "model.expert_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "model.shared_expert_ffn_hidden_size",
    "moe_shared_expert_gate": "model.shared_expert_gate",
    "moe_layer_freq": "model.first_dense_layers",
    "layernorm_epsilon": "model.norm_eps",
    "norm_epsilon": "model.norm_eps",
    "activation_func": "model.activation",
    "attention_dropout": "model.attention_dropout",
    "hidden_dropout": "model.hidden_dropout",
    "init_method_std": "model.init_std",
    "qk_layernorm": "model.qk_norm",
    "add_qkv_bias": "model.qkv_bias",
    "multi_latent_attention": "model.attention",
    "q_lora_rank": "model.mla.q_lora_rank",
    "kv_lora_rank": "model.mla.kv_lora_rank",
    "qk_head_dim": "model.mla.qk_nope_head_dim",
    "qk_pos_emb_head_dim": "model.mla.qk_rope_head_dim",
    "v_head_dim": "model.mla.v_head_dim",
    "rotary_base": "model.rope_theta",
    "rope_type": "model.rope_scaling.type",
    "rotary_scaling_factor": "model.rope_scaling.factor",
    "original_max_position_embeddings": "model.rope_scaling.original_max_position",
    "moe_router_load_balancing_type": "model.router.balance",
    "moe_aux_loss_coeff": "model.router.balance_coeff",
    "moe_z_loss_coeff": "model.router.z_loss_coeff",
    "moe_router_score_function": "model.router.score_function",
    "moe_router_pre_softmax": "model.router.pre_softmax",
    "moe_router_enable_expert_bias": "model.router.expert_bias",
    "moe_router_bias_update_rate": "model.router.expert_bias_rate",
    "moe_router_dtype": "model.router.dtype",
    "moe_router_num_groups": "model.router.num_groups",
    "moe_router_group_topk": "model.router.group_topk",
    "moe_router_topk_scaling_factor": "model.router.scaling_factor",
    "moe_token_dispatcher_type": "parallel.dispatcher",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "sequence_parallel": "parallel.tensor",
    "overlap_p2p_comm": "parallel.virtual_pipeline",
    "recompute_granularity": "train.recompute",
    "recompute_method": "train.recompute",
    "recompute_num_layers": "train.recompute",
    "recompute_modules": "train.recompute",
    "params_dtype": "device.dtype",
}
# A field or an option: words joined by underscores or dashes, with or without leading dashes.
_NAME = re.compile(r"(?<![\w.-])(--)?([a-z][a-z0-9]*(?:[-_][a-z0-9]+)+)\b")


def in_our_words(text: str) -> str:
    """Their message in one line, with our keys for their fields and options."""

    def translate(match: re.Match[str]) -> str:
        key = _KEYS.get(match[2].replace("-", "_"))
        if key is not None:
            return key
        return f"megatron-core's {match[2].replace('-', ' ')}" if match[1] else match[0]

    return _NAME.sub(translate, " ".join(text.split()))


@contextmanager
def megatron_refusals() -> Iterator[None]:
    """Turns what megatron-core refuses in the block into an error of our configuration.

    Raises:
        ConfigError: it begins with the first of our keys in the message ("model" if none is).
    """
    try:
        yield
    except ConfigError:
        raise
    except (AssertionError, ValueError) as error:
        text = in_our_words(str(error))
        found = re.search(r"\b(?:model|parallel|train|device)\.[a-z_.]*[a-z]", text)
        raise ConfigError(
            f"{found[0] if found else 'model'}: megatron-core refuses the configuration ({text}); "
            "change the keys that are named"
        ) from error
