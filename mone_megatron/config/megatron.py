"""Defines the group ``megatron``: megatron-core's settings without a key of ours, by its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mone_megatron.config.convert import Scalar
from mone_megatron.config.group import Group

# Fields that say how something is computed, and not what.
_COMPUTES_THE_SAME = re.compile(
    r"recompute_|overlap_|tp_comm_|cuda_graph_|cpu_offloading|distribute_saved_activations"
    r"|deterministic_mode|moe_(deepep|hybridep|flex_dispatcher)_|delay_wgrad_compute|\w+_fusion$"
)
_OURS = "this project decides it"
_STATE = "checkpoints do not hold what it keeps"
_MISSING = "the models of this project have no such part"
_GRAPHS = "experts get other numbers of rows in each step, and this trainer makes no CUDA graph"
_CPU = "it follows from device.kind"

# Part -> field of megatron-core -> the key of ours that sets it, or why it cannot be set. Users may
# not set these. megatron-core's refusals are told with these keys
# (:mod:`mone_megatron.model.megatron_words`).
SET_HERE: Mapping[str, Mapping[str, str]] = {
    "transformer": {
        "num_layers": "model.num_layers",
        "hidden_size": "model.hidden_size",
        "num_attention_heads": "model.num_attention_heads",
        "num_query_groups": "model.num_query_groups",
        "kv_channels": "model.head_dim",
        "ffn_hidden_size": "model.dense_ffn_hidden_size",
        "num_moe_experts": "model.num_experts",
        "moe_router_topk": "model.experts_per_token",
        "moe_ffn_hidden_size": "model.expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size": "model.shared_expert_ffn_hidden_size",
        "moe_shared_expert_gate": "model.shared_expert_gate",
        "moe_layer_freq": "model.first_dense_layers",
        "layernorm_epsilon": "model.norm_eps",
        "activation_func": "model.activation",
        "attention_dropout": "model.attention_dropout",
        "hidden_dropout": "model.hidden_dropout",
        "init_method_std": "model.init_std",
        "qk_layernorm": "model.qk_norm",
        "add_qkv_bias": "model.qkv_bias",
        "window_size": "model.attention_window",
        "window_attn_skip_freq": "model.full_attention_every",
        "softmax_type": "model.attention_sink",
        "mtp_num_layers": "model.mtp.depth",
        "mtp_loss_scaling_factor": "model.mtp.coeff",
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
        "beta_fast": "model.rope_scaling.beta_fast",
        "beta_slow": "model.rope_scaling.beta_slow",
        "mscale": "model.rope_scaling.mscale",
        "mscale_all_dim": "model.rope_scaling.mscale_all_dim",
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
        "batch_p2p_comm": "parallel.virtual_pipeline",
        "recompute_granularity": "train.recompute",
        "recompute_method": "train.recompute",
        "recompute_num_layers": "train.recompute",
        "recompute_modules": "train.recompute",
        "params_dtype": "device.dtype",
        "pipeline_dtype": "device.dtype",
        "bf16": "device.dtype",
        "fp16": "device.dtype",
        "calculate_per_token_loss": _OURS,
        "perform_initialization": _OURS,
        "variable_seq_lengths": _OURS,
        "is_hybrid_model": _MISSING,
        "mtp_use_repeated_layer": _MISSING,
        "enable_cuda_graph": _GRAPHS,
        "external_cuda_graph": _GRAPHS,
        "cuda_graph_impl": _GRAPHS,
        "fp8_param": _STATE,
        "heterogeneous_block_specs": _MISSING,
        "normalization": _OURS,
        "add_bias_linear": _OURS,
        "gated_linear_unit": _OURS,
        "moe_grouped_gemm": _OURS,
        "attention_softmax_in_fp32": _OURS,
        "init_method": _OURS,
        "output_layer_init_method": _OURS,
        "gradient_accumulation_fusion": _OURS,
        "bias_activation_fusion": _OURS,
        "masked_softmax_fusion": _OURS,
        "apply_rope_fusion": _OURS,
        "persist_layer_norm": _OURS,
        "cuda_graph_scope": _OURS,
        "use_cpu_initialization": _CPU,
        "bias_dropout_fusion": _CPU,
        "deallocate_pipeline_outputs": _CPU,
    },
    "optimizer": {
        "optimizer": "optim.name",
        "lr": "optim.lr",
        "min_lr": "optim.min_lr",
        "weight_decay": "optim.weight_decay",
        "adam_beta1": "optim.beta1",
        "adam_beta2": "optim.beta2",
        "adam_eps": "optim.eps",
        "clip_grad": "optim.clip_grad",
        "bf16": "device.dtype",
        "fp16": "device.dtype",
        "params_dtype": "device.dtype",
        "use_distributed_optimizer": "parallel.distributed_optimizer",
        "decoupled_weight_decay": _OURS,
        "use_precision_aware_optimizer": _STATE,
        "optimizer_cpu_offload": _STATE,
        "use_layer_wise_distributed_optimizer": _STATE,
        "loss_scale": _OURS,
    },
    "ddp": {
        "overlap_grad_reduce": "parallel.overlap_grad_reduce",
        "overlap_param_gather": "parallel.overlap_param_gather",
        "use_distributed_optimizer": "parallel.distributed_optimizer",
        "grad_reduce_in_fp32": _OURS,
        "use_megatron_fsdp": _STATE,
        "use_custom_fsdp": _STATE,
        "check_for_nan_in_grad": "train.on_bad_loss",
    },
}


@dataclass(frozen=True)
class MegatronConfig(Group):
    """Sets fields of the installed megatron-core, by its own names
    (docs/parallelism.md#megatron).
    """

    transformer: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    """Fields of its TransformerConfig (MLATransformerConfig with `model.attention=mla`)."""
    optimizer: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    """Fields of its OptimizerConfig."""
    ddp: Mapping[str, Scalar] = field(default_factory=dict, hash=False)
    """Fields of its DistributedDataParallelConfig."""

    def changing(self) -> list[str]:
        """Returns the keys that are set and may change what a model computes."""
        return [
            f"megatron.transformer.{name}"
            for name in self.transformer
            if not _COMPUTES_THE_SAME.match(name)
        ]

    def given(self) -> Mapping[str, Mapping[str, Scalar]]:
        """Returns the fields that are set, by part."""
        return {"transformer": self.transformer, "optimizer": self.optimizer, "ddp": self.ddp}


def with_given(part: str, ours: Mapping[str, Any], given: Mapping[str, Scalar]) -> dict[str, Any]:
    """Returns the arguments of one of megatron-core's dataclasses.

    Args:
        part: of :data:`SET_HERE`, which must name every field of ``ours``.
        ours: the fields that this project sets.
        given: the fields that the user sets, from :class:`MegatronConfig`.
    """
    unnamed = ours.keys() - SET_HERE[part].keys()
    assert not unnamed, f"SET_HERE[{part!r}] lacks {sorted(unnamed)}"
    assert not SET_HERE[part].keys() & given.keys(), "the configuration was not checked"
    return {**ours, **given}
