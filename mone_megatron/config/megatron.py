"""Defines the group ``megatron``: megatron-core's settings without a key of ours, by its names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from mone_megatron.config.convert import Scalar
from mone_megatron.config.group import Group
from mone_megatron.config.marks import Reserved

# Fields that say how something is computed, where, or in training alone, and not what.
_COMPUTES_THE_SAME = re.compile(
    r"recompute_|overlap_|tp_comm_|cuda_graph_|cpu_offloading|distribute_saved_activations"
    r"|deterministic_mode|moe_(deepep|hybridep|flex_dispatcher)_|delay_wgrad_compute|\w+_fusion$"
    r"|num_layers_in_(first|last)_pipeline_stage|pipeline_model_parallel_layout"
    r"|account_for_\w+_in_pipeline_split|batch_p2p_sync|microbatch_group_size_per_vp_stage"
    r"|barrier_with_L1_time|config_logger_dir|clone_scatter_output_in_embedding|cp_comm_type"
    r"|defer_embedding_wgrad_compute|wgrad_deferral_limit|symmetric_ar_type"
    r"|disable_parameter_transpose_cache|mtp_detach_heads"
)
_OURS = "this project decides it"
_STATE = "checkpoints do not hold what it keeps"
_MISSING = "the models of this project have no such part"
_GRAPHS = "this trainer makes CUDA graphs of attention only, by cuda_graph_impl=transformer_engine"
_CPU = "it follows from device.kind"
_SERVING = "it is for generating text, which this project does from exports"
_STEP = "the training step of this project does not read it"
_WEIGHTS = "this project draws the initial weights itself"
_GROUPS = "this project makes no process groups for it"
_FP16 = "it is for fp16, which this project does not train in"
_OPTIMIZER = "the optimizers of optim.name do not read it"
_FSDP = "it is for Megatron-FSDP, which cannot be used: its checkpoints would not hold our experts"
# docs/parallelism.md#not-run-here
_UNSAVED = "its checkpoints would keep the experts of one rank only, without a word"
_BUFFERS = "this project makes no buffers for it"
_RANDOM = "this project keeps the random states itself"
_TESTS = "it is for megatron-core's own tests"
_KITCHEN = "this project takes no modules of Kitchen"
_NCCL_EP = "it is for NCCL-EP, which cannot be used"
_NOWHERE = "megatron-core reads it nowhere"

# The field that asks for CUDA graphs, of attention (:mod:`mone_megatron.parallel.cuda_graphs`).
GRAPHS = "cuda_graph_impl"

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
        "moe_router_topk_limited_devices": "model.router.group_topk",
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
        # Of attention, whichever of the two names the installed release has for it.
        "cuda_graph_scope": f"megatron.transformer.{GRAPHS}",
        "cuda_graph_modules": f"megatron.transformer.{GRAPHS}",
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
        "loss_scale": _OURS,
    },
    "ddp": {
        "overlap_grad_reduce": "parallel.overlap_grad_reduce",
        "overlap_param_gather": "parallel.overlap_param_gather",
        "use_distributed_optimizer": "parallel.distributed_optimizer",
        "grad_reduce_in_fp32": _OURS,
        "check_for_nan_in_grad": "train.on_bad_loss",
    },
}

# Part -> field of megatron-core, or with an underscore at the end how fields begin -> why nothing
# here reads it, or only half of what would have to. It would be taken without a word. Of either
# release: a field that the installed one lacks is nobody's to set.
NOT_READ: Mapping[str, Mapping[str, str]] = {
    "transformer": {
        "is_hybrid_model": _MISSING,
        "mtp_use_repeated_layer": _MISSING,
        "mtp_hybrid_override_pattern": _MISSING,
        "mtp_standalone": _MISSING,
        "heterogeneous_block_specs": _MISSING,
        "hetereogenous_dist_checkpoint": _OURS,
        "experimental_attention_variant": _MISSING,
        "dsa_": _MISSING,
        "linear_": _MISSING,
        "mamba_": _MISSING,
        "use_mamba_mem_eff_path": _MISSING,
        "qk_l2_norm": _MISSING,
        "moe_use_legacy_grouped_gemm": _MISSING,
        "moe_extended_tp": _MISSING,
        "enable_cuda_graph": _GRAPHS,
        "external_cuda_graph": _GRAPHS,
        "cuda_graph_use_single_mempool": _GRAPHS,
        "cuda_graph_retain_backward_graph": _GRAPHS,
        "inference_": _SERVING,
        "use_inference_optimized_layers": _SERVING,
        "nccl_all_reduce_for_prefill": _SERVING,
        "mlp_chunks_for_prefill": _SERVING,
        "cache_mla_latents": _SERVING,
        "moe_pad_experts_for_cuda_graph_inference": _SERVING,
        "fp8_param": _STATE,
        "fp4_param": _STATE,
        # muP is learning rates by parameter, too, which megatron-core leaves to the trainer.
        "use_mup": _WEIGHTS,
        "mup_": _WEIGHTS,
        "embedding_init_method_std": _WEIGHTS,
        "init_model_with_meta_device": _WEIGHTS,
        "tensor_parallel_num_weight_shards": _GROUPS,
        "expert_tensor_parallel_num_weight_shards": _GROUPS,
        "gtp_weight_remat_size": _GROUPS,
        "expert_gtp_weight_remat_size": _GROUPS,
        "hybrid_context_parallel": _GROUPS,
        "max_seqlen_per_dp_cp_rank": _GROUPS,
        # Schedules that ask the step for more than a microbatch's loss.
        "overlap_moe_expert_parallel_comm": _STEP,
        "delay_wgrad_compute": _STEP,
        "overlap_dispatch_backward_with_experts_wgrad": _STEP,
        "ep_overlap_early_attn_memory_release": _STEP,
        "high_priority_a2a_comm_stream": _STEP,
        "num_microbatches_with_partial_activation_checkpoints": _STEP,
        "moe_enable_routing_replay": _STEP,
        "moe_layer_recompute": "train.recompute",
        # What is computed in another type is autocast on CUDA only.
        "enable_autocast": "device.dtype",
        "autocast_dtype": "device.dtype",
        "tp_comm_": _BUFFERS,
        "pipeline_model_parallel_comm_backend": _GROUPS,
        "use_te_rng_tracker": _RANDOM,
        "test_mode": _TESTS,
        "use_kitchen": _KITCHEN,
        "use_kitchen_attention": _KITCHEN,
        "kitchen_attention_backend": _KITCHEN,
        "moe_ncclep_": _NCCL_EP,
        # Of a way to balance experts that model.router.balance has not.
        "moe_router_quantile_balancing_ema": _MISSING,
        # Part of apply_rope_fusion.
        "fused_single_qkv_rope": _OURS,
        "use_ring_exchange_p2p": "PyTorch has no ring_exchange",
        "cross_entropy_loss_fusion": _OURS,
        "cross_entropy_fusion_impl": _OURS,
        "transformer_impl": _OURS,
        "use_grouped_gemm_for_shared_expert": _OURS,
        "use_grouped_gemm_for_dense_mlp": _OURS,
        "mla_down_proj_fusion": _OURS,
        # Another order of a shared expert's weights than exports and checkpoints have.
        "moe_shared_expert_glu_interleave_size": _OURS,
        "apply_residual_connection_post_layernorm": _NOWHERE,
        "moe_token_dropping": _NOWHERE,
        "moe_per_layer_logging": _NOWHERE,
        "async_tensor_model_parallel_allreduce": _NOWHERE,
        "disable_bf16_reduced_precision_matmul": _NOWHERE,
    },
    "optimizer": {
        "fp8_recipe": _STATE,
        "use_precision_aware_optimizer": _STATE,
        "store_param_remainders": _STATE,
        "optimizer_cpu_offload": _STATE,
        "optimizer_offload_fraction": _STATE,
        "use_torch_optimizer_for_cpu_offload": _STATE,
        "overlap_cpu_optimizer_d2h_h2d": _STATE,
        "pin_cpu_": _STATE,
        "reuse_grad_buf_for_mxfp8_param_ag": _STATE,
        "use_layer_wise_distributed_optimizer": _STATE,
        "optimizer_cuda_graph": _GRAPHS,
        "initial_loss_scale": _FP16,
        "min_loss_scale": _FP16,
        "loss_scale_window": _FP16,
        "hysteresis": _FP16,
        "overlap_param_gather": "parallel.overlap_param_gather",
        "overlap_param_gather_with_optimizer_step": _STEP,
        "grad_norm_skip_threshold": _STEP,
        "log_num_zeros_in_grad": _STEP,
        "sgd_": _OPTIMIZER,
        "muon_": _OPTIMIZER,
        "lion_": _OPTIMIZER,
        "soap_": _OPTIMIZER,
        "adaptive_muon_": _OPTIMIZER,
    },
    "ddp": {
        "use_megatron_fsdp": _UNSAVED,
        "use_custom_fsdp": _UNSAVED,
        "fsdp_": _FSDP,
        "megatron_fsdp_": _FSDP,
        "data_parallel_sharding_strategy": _FSDP,
        "outer_dp_sharding_strategy": _FSDP,
        "keep_fp8_transpose_cache": _FSDP,
        "preserve_fp32_weights": _FSDP,
        "suggested_communication_unit_size": _FSDP,
        "gradient_reduce_div_fusion": _FSDP,
        "num_buckets": _FSDP,
        "fp8_param_gather": _STATE,
        "fp4_param_gather": _STATE,
        "reuse_grad_buf_for_mxfp8_param_ag": _STATE,
        "num_distributed_optimizer_instances": _GROUPS,
        "delay_wgrad_compute": _STEP,
        "check_for_large_grads": "train.on_bad_loss",
    },
}

# Part -> field of megatron-core, or how fields begin -> fields of which one has to be set for it to
# be read.
READ_WITH: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "transformer": {
        "fp8_": ("fp8",),
        "fp4_": ("fp4",),
        "tp_only_amax_red": ("fp8", "fp4"),
        "first_last_layers_bf16": ("fp8", "fp4"),
        "num_layers_at_start_in_bf16": ("first_last_layers_bf16",),
        "num_layers_at_end_in_bf16": ("first_last_layers_bf16",),
        "cpu_offloading_": ("cpu_offloading",),
        "cuda_graph_warmup_steps": (GRAPHS,),
        "wgrad_deferral_limit": ("defer_embedding_wgrad_compute",),
        "qk_clip_": ("qk_clip",),
        "moe_pad_expert_input_to_capacity": ("moe_expert_capacity_factor",),
        "moe_token_drop_policy": ("moe_expert_capacity_factor",),
        "moe_paged_stash_": ("moe_paged_stash",),
        "min_offloaded_tensor_size": ("fine_grained_activation_offloading",),
        "delay_offload_until_cuda_graph": ("fine_grained_activation_offloading",),
        "delta_offload_bytes_across_pp_ranks": ("fine_grained_activation_offloading",),
        "activation_offload_fraction": ("fine_grained_activation_offloading",),
        "fine_grained_offloading_": ("fine_grained_activation_offloading",),
    },
    "optimizer": {"decoupled_min_lr": ("decoupled_lr",)},
    "ddp": {"disable_symmetric_registration": ("nccl_ub",)},
}

# Fields of its TransformerConfig that only the flex dispatcher reads: how their names begin.
FLEX = ("moe_flex_dispatcher_num_", "moe_deepep_", "moe_hybridep_", "moe_permute_fusion_into_")

# What only modules of Transformer Engine read, or what is made of it. On a CPU there are none.
BY_TRANSFORMER_ENGINE = frozenset(
    {
        "cp_comm_type",
        "cpu_offloading",
        "disable_parameter_transpose_cache",
        "moe_permute_fusion",
        "moe_router_fusion",
        "symmetric_ar_type",
    }
)

# Fields of its DistributedDataParallelConfig that are of NCCL: gloo has nothing for them.
BY_NCCL = frozenset({"nccl_ub"})


def found_in(name: str, names: Iterable[str]) -> str | None:
    """Returns the one of ``names`` that a field has or, where it ends in ``_``, begins with."""
    starts = (one for one in names if one == name or (one.endswith("_") and name.startswith(one)))
    return next(starts, None)


def may_change_model(name: str) -> bool:
    """Returns whether a field of its TransformerConfig may change what a model computes."""
    return _COMPUTES_THE_SAME.match(name) is None


def why_not_settable(part: str, name: str) -> str | None:
    """Returns the key of ours that sets a field of megatron-core, or why it cannot be set.

    Args:
        part: "transformer", "optimizer" or "ddp".
        name: the field.

    Returns:
        None for a field that ``megatron`` may set.
    """
    if name in SET_HERE[part]:
        return SET_HERE[part][name]
    entry = found_in(name, NOT_READ[part])
    return None if entry is None else NOT_READ[part][entry]


def refusal(part: str, name: str) -> str | None:
    """Returns why a field of megatron-core may not be set, and what to do; None for one that may.

    Args:
        part: "transformer", "optimizer" or "ddp".
        name: the field.
    """
    reason = why_not_settable(part, name)
    if reason is None:
        return None
    if "." in reason and " " not in reason:
        return f"{reason} sets it; use that key"
    return f"it cannot be set ({reason}); leave it out"


@dataclass(frozen=True)
class MegatronConfig(Group):
    """Sets fields of the installed megatron-core, by its own names
    (docs/parallelism.md#megatron).
    """

    transformer: Annotated[Mapping[str, Scalar], Reserved(partial(refusal, "transformer"))] = field(
        default_factory=dict, hash=False
    )
    """Fields of its TransformerConfig (MLATransformerConfig with `model.attention=mla`)."""
    optimizer: Annotated[Mapping[str, Scalar], Reserved(partial(refusal, "optimizer"))] = field(
        default_factory=dict, hash=False
    )
    """Fields of its OptimizerConfig."""
    ddp: Annotated[Mapping[str, Scalar], Reserved(partial(refusal, "ddp"))] = field(
        default_factory=dict, hash=False
    )
    """Fields of its DistributedDataParallelConfig."""

    def changing(self) -> list[str]:
        """Returns the keys that are set and may change what a model computes."""
        return [
            f"megatron.transformer.{name}" for name in self.transformer if may_change_model(name)
        ]

    def of_the_model(self) -> MegatronConfig:
        """Returns the fields that may change what a model computes, in whatever layout."""
        return MegatronConfig(
            {name: value for name, value in self.transformer.items() if may_change_model(name)}
        )

    def given(self) -> Mapping[str, Mapping[str, Scalar]]:
        """Returns the fields that are set, by part."""
        return {"transformer": self.transformer, "optimizer": self.optimizer, "ddp": self.ddp}


def graphs_attention(megatron: MegatronConfig) -> bool:
    """Returns whether CUDA graphs of attention are asked for."""
    return megatron.transformer.get(GRAPHS) == "transformer_engine"


def with_given(part: str, ours: Mapping[str, Any], given: Mapping[str, Scalar]) -> dict[str, Any]:
    """Returns the arguments of one of megatron-core's dataclasses.

    Args:
        part: of :data:`SET_HERE`, which must name every field of ``ours``.
        ours: the fields that this project sets.
        given: the fields that the user sets, from :class:`MegatronConfig`.
    """
    unnamed = ours.keys() - SET_HERE[part].keys()
    assert not unnamed, f"SET_HERE[{part!r}] lacks {sorted(unnamed)}"
    refused = [name for name in given if why_not_settable(part, name) is not None]
    assert not refused, f"the configuration was not checked: {refused}"
    return {**ours, **given}
