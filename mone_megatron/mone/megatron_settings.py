"""Refuses settings of megatron-core that a module of ours does not read, when it is built.

megatron-core's own modules read them. One that takes their place and leaves a setting out would
compute something else than was asked for, without a word. It imports no torch: a configuration that
asks for one of them is refused before (:mod:`mone_megatron.config.checks.megatron`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# Field -> the one value that our module computes. Fields that this megatron-core has not are passed
# over: nobody can set them.
_COMMON: dict[str, Any] = {
    "fp8": None,
    "fp4": None,
    "quant_recipe": None,
    "use_kitchen": False,
    "batch_invariant_mode": False,
    "fine_grained_activation_offloading": False,
}
GATED_MLP: dict[str, Any] = _COMMON | {
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "activation_func_fp8_input_store": False,
    "use_te_activation_func": False,
    # Neurons and experts are balanced over all tokens of a microbatch.
    "mlp_chunks_for_training": 1,
}
ROUTED_EXPERTS: dict[str, Any] = GATED_MLP | {
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_router_padding_for_fp8": False,
    "moe_router_padding_for_quantization": False,
    "moe_mlp_glu_interleave_size": None,
    "moe_single_grouped_weight": False,
    "moe_single_grouped_bias": False,
    "moe_expert_rank_capacity_factor": None,
    "moe_paged_stash": False,
    "use_fused_weighted_squared_relu": False,
    "use_transformer_engine_op_fuser": False,
}
SHARED_EXPERT: dict[str, Any] = GATED_MLP | {"moe_shared_expert_overlap": False}
CORE_ATTENTION: dict[str, Any] = _COMMON | {
    "apply_query_key_layer_scaling": False,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "use_kitchen_attention": False,
    "flash_decode": False,
    "flash_attention_version": None,
}
NORM: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "batch_invariant_mode": False,
    "fused_residual_rmsnorm": False,
    "memory_efficient_layer_norm": False,
    # It would get fp32, and give it on to layers in bf16.
    "fp32_residual_connection": False,
}


def refuse_unread(module: str, config: TransformerConfig, computed: Mapping[str, Any]) -> None:
    """Refuses a configuration that asks a module for what it does not compute.

    Args:
        module: the module's name, for messages.
        config: megatron-core's configuration of the model.
        computed: the one value of each setting that the module computes.

    Raises:
        ValueError: naming every such setting, with the value to use.
    """
    given = vars(config)
    problems = [
        f"{field}={given[field]!r} (only {value!r})"
        for field, value in computed.items()
        if field in given and given[field] != value
    ]
    if problems:
        raise ValueError(f"{module} does not compute {', '.join(problems)}")
