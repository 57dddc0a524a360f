"""Turns our configuration into megatron-core's TransformerConfig, plain data into plain data."""

from __future__ import annotations

from dataclasses import fields

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from mone_megatron.config.megatron import graphs_attention, with_given
from mone_megatron.config.schema import Config, ModelConfig
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.model.megatron_words import megatron_refusals
from mone_megatron.parallel import fusions

# model.attention_sink in megatron-core's words.
_SINKS = {"none": "vanilla", "zero": "off-by-one", "learnable": "learnable"}


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as it is: :mod:`.initialize` replaces megatron-core's initial values."""
    return tensor


def _router_fields(model: ModelConfig) -> dict[str, object]:
    router = model.router
    # Routers that weigh experts by themselves do not read it, and with one expert a token
    # megatron-core would refuse that it is off.
    not_read = ROUTERS[router.kind].own_weights and model.experts_per_token == 1
    kinds = list(router.balance) or ["none"]
    coefficients = list(router.balance_coeff) or [0.0]
    several = len(kinds) > 1
    return {
        "moe_router_load_balancing_type": kinds if several else kinds[0],
        "moe_aux_loss_coeff": coefficients if several else coefficients[0],
        "moe_z_loss_coeff": router.z_loss_coeff or None,
        "moe_router_score_function": router.score_function,
        "moe_router_pre_softmax": router.pre_softmax or not_read,
        "moe_router_enable_expert_bias": router.expert_bias,
        "moe_router_bias_update_rate": router.expert_bias_rate,
        "moe_router_dtype": None if router.dtype == "model" else router.dtype,
        "moe_router_num_groups": router.num_groups or None,
        "moe_router_group_topk": router.group_topk or None,
        "moe_router_topk_scaling_factor": router.scaling_factor or None,
    }


def _attention_fields(model: ModelConfig) -> dict[str, object]:
    if model.attention == "gqa":
        return {"kv_channels": model.head_dim or model.hidden_size // model.num_attention_heads}
    mla, scaling = model.mla, model.rope_scaling
    yarn = scaling.type == "yarn"
    return {
        "kv_channels": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rotary_base": model.rope_theta,
        "rope_type": "yarn" if yarn else "rope",
        # The scale of the scores is made of this factor whatever the type.
        "rotary_scaling_factor": scaling.factor if yarn else 1.0,
        "original_max_position_embeddings": scaling.original_max_position,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        # megatron-core's way to say that neither is given.
        "mscale": scaling.mscale or 1.0,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def _graphs(config: Config) -> dict[str, object]:
    """Returns what runs as CUDA graphs: attention or nothing, by the installed release's name."""
    known = {field.name for field in fields(TransformerConfig)}
    name = "cuda_graph_modules" if "cuda_graph_modules" in known else "cuda_graph_scope"
    return {name: ["attn"] if graphs_attention(config.megatron) else []}


def moe_layer_pattern(config: Config) -> list[int]:
    """Returns 1 for each layer that is MoE, and 0 for each that is dense."""
    model = config.model
    if model.num_experts == 0:
        return [0] * model.num_layers
    dense = model.first_dense_layers
    return [0] * dense + [1] * (model.num_layers - dense)


@megatron_refusals()
def transformer_config(
    config: Config, *, dtype: torch.dtype, on_cpu: bool, sequence_parallel: bool
) -> TransformerConfig:
    """Returns megatron-core's configuration of the model and its parallelism.

    Args:
        config: the validated configuration.
        dtype: of parameters and activations, fp32 or bf16.
        on_cpu: whether parameters are made on CPU.
        sequence_parallel: whether activations between layers are split over the
            tensor-parallel ranks.

    Raises:
        ConfigError: when megatron-core refuses the configuration.
    """
    model, parallel = config.model, config.parallel
    recompute: dict[str, object] = {}
    if config.train.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.train.recompute == "selective":
        modules = ["core_attn"] + (["moe"] if model.num_experts else ["mlp"])
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    experts: dict[str, object] = {}
    if model.num_experts:
        experts = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.experts_per_token,
            "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size or None,
            "moe_shared_expert_gate": model.shared_expert_gate,
            "moe_layer_freq": moe_layer_pattern(config),
            "moe_token_dispatcher_type": parallel.dispatcher,
            "moe_grouped_gemm": True,
            **_router_fields(model),
        }
    fused, free = fusions.settings(config, on_cpu=on_cpu)
    kind = MLATransformerConfig if model.attention == "mla" else TransformerConfig
    values = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.dense_ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        # Only adds gradients of the two norms up over tensor-parallel ranks, which is wrong where
        # their weights are split over the ranks.
        qk_layernorm=model.qk_norm and model.qk_norm_scope == "head",
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[model.activation].function,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        attention_softmax_in_fp32=True,
        window_size=(model.attention_window - 1, 0) if model.attention_window else None,
        window_attn_skip_freq=model.full_attention_every or None,
        softmax_type=_SINKS[model.attention_sink],
        mtp_num_layers=model.mtp.depth or None,
        mtp_loss_scaling_factor=model.mtp.coeff,
        init_method=_leave,
        output_layer_init_method=_leave,
        init_method_std=model.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=on_cpu,
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Frees an activation once its send is issued, which is safe in stream order; gloo reads
        # the buffer later, and would send what stands there by then.
        deallocate_pipeline_outputs=not on_cpu,
        # Interleaved, two ranks are each other's next and previous stage, and batched sends
        # between one pair of ranks are matched in order, not by direction: activations would
        # arrive as gradients, without an error. Separate calls keep the directions apart.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        **_graphs(config),
        **fused,
        **_attention_fields(model),
        **experts,
        **recompute,
    )
    return kind(**with_given("transformer", values, {**free, **config.megatron.transformer}))
