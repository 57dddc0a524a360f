"""Cross-field checks of a config, before any device or process group is touched.

:func:`validate` is pure arithmetic over the config and the number of processes. It repeats, with
our key names, the rules that megatron-core 0.16.1 would otherwise enforce with an assertion after
minutes of start-up, and adds those of the MoNE layer.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mone_megatron.config.convert import from_dict, keys
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import (
    CheckpointConfig,
    Config,
    ModelConfig,
    MoNEConfig,
    MoNETarget,
    ParallelConfig,
)
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import Budget, count_kept
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.sources import SOURCES

# Tokens 0-255 of a byte-level BPE are the bytes; the rest is learnt, plus end-of-text.
_SMALLEST_BPE = 257
# NumPy, which shuffles the data, takes seeds below 2**32; megatron-core adds to them by rank.
_LARGEST_SEED = 2**31 - 1
# megatron-core numbers the sources of a blend with 16 bits.
_MOST_SOURCES = 32766
# The first step that train.profile traces: memory is allocated, caches are warm.
PROFILED_FROM = 5
# torch.nn.functional.grouped_mm wants every stride to be a multiple of 16 bytes.
_GROUPED_MM_ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """How the processes of a run are used; derived, never configured."""

    # Processes in all.
    world_size: int
    # Data-parallel replicas of everything outside the experts.
    data: int
    # Data-parallel replicas of each expert shard.
    expert_data: int
    # Forward passes of each data-parallel rank in one step.
    num_microbatches: int
    # Activations between layers are sharded along the sequence over the tensor-parallel ranks.
    sequence_parallel: bool


def validate(
    config: Config,
    *,
    world_size: int,
    num_devices: int | None = None,
    local_world_size: int | None = None,
    have_transformer_engine: bool | None = None,
    have_deep_ep: bool | None = None,
) -> Layout:
    """Check ``config`` for a run of ``world_size`` processes.

    ``num_devices`` is the number of CUDA devices of this machine and ``local_world_size`` the
    number of processes on it; None where unknown. The last two say whether an optional package is
    there; None looks (without importing it).

    Raises:
        ConfigError: every problem at once, each a line naming the key, the numbers and the fix.
    """
    if have_transformer_engine is None:
        have_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    if have_deep_ep is None:
        have_deep_ep = importlib.util.find_spec("deep_ep") is not None
    cpu = config.device.kind == "cpu" or (config.device.kind == "auto" and num_devices == 0)
    problems = [
        *_ranges(config),
        *_model(config.model),
        *_rope_scaling(config.model),
        *_router(config),
        *_mone(config),
        *_data(config),
        *_schedule(config),
        *_loss_faults(config),
        *_eval_tasks(config),
        *_hooks(config),
        *_checkpoint(config.checkpoint),
        *_sharding(config),
        *_world(config.parallel, world_size),
        *_batch(config, world_size),
        *_device(config, num_devices, local_world_size, cpu=cpu),
        *_backend(
            config, cpu=cpu, transformer_engine=have_transformer_engine, deep_ep=have_deep_ep
        ),
        *_alignment(config, bf16=_is_bf16(config, num_devices, cpu=cpu)),
    ]
    if problems:
        raise ConfigError(problems)
    parallel = config.parallel
    data = world_size // model_parallel_size(parallel)
    return Layout(
        world_size=world_size,
        data=data,
        expert_data=world_size // expert_parallel_size(parallel),
        num_microbatches=config.train.global_batch_size // (config.train.micro_batch_size * data),
        sequence_parallel=parallel.tensor > 1,
    )


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of everything outside the experts."""
    return parallel.tensor * parallel.pipeline * parallel.context


def expert_parallel_size(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of all experts."""
    return parallel.expert * parallel.expert_tensor * parallel.pipeline


def smallest_world_size(parallel: ParallelConfig) -> int:
    """The fewest processes that the layout can run on; others are multiples of it."""
    return math.lcm(model_parallel_size(parallel), expert_parallel_size(parallel))


def _ranges(config: Config) -> Iterator[str]:
    """Values that are wrong whatever the others are."""
    model, mone, train, optim = config.model, config.mone, config.train, config.optim
    parallel, logging, device = config.parallel, config.logging, config.device
    at_least_1 = {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
        "model.vocab_padding_multiple": model.vocab_padding_multiple,
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.context": parallel.context,
        "parallel.expert": parallel.expert,
        "parallel.expert_tensor": parallel.expert_tensor,
        "train.steps": train.steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "train.seq_length": train.seq_length,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "logging.interval": logging.interval,
        "logging.alerts.patience": logging.alerts.patience,
        "device.timeout_seconds": device.timeout_seconds,
    }
    if model.num_experts > 0:
        at_least_1["model.experts_per_token"] = model.experts_per_token
        at_least_1["model.expert_ffn_hidden_size"] = model.expert_ffn_hidden_size
    if _dense_layers(model) > 0:
        at_least_1["model.dense_ffn_hidden_size"] = model.dense_ffn_hidden_size
    if train.eval_interval > 0:
        at_least_1["train.eval_steps"] = train.eval_steps
    for key, size in at_least_1.items():
        if size < 1:
            yield f"{key}: {size} is too small; use 1 or more"

    at_least_0 = {
        "model.head_dim": model.head_dim,
        "model.num_experts": model.num_experts,
        "model.shared_expert_ffn_hidden_size": model.shared_expert_ffn_hidden_size,
        "model.first_dense_layers": model.first_dense_layers,
        "model.vocab_size": model.vocab_size,
        "model.init_std": model.init_std,
        "model.router.z_loss_coeff": model.router.z_loss_coeff,
        "model.router.num_groups": model.router.num_groups,
        "model.router.group_topk": model.router.group_topk,
        "model.router.scaling_factor": model.router.scaling_factor,
        "mone.balance.coeff": mone.balance.coeff,
        "data.max_megabytes": config.data.max_megabytes,
        "data.num_workers": config.data.num_workers,
        "optim.min_lr": optim.min_lr,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_grad": optim.clip_grad,
        "train.seed": train.seed,
        "train.eval_interval": train.eval_interval,
        "train.eval_tasks_interval": train.eval_tasks_interval,
        "train.eval_tasks_limit": train.eval_tasks_limit,
        "train.profile": train.profile,
        "train.exit_after_minutes": train.exit_after_minutes,
        "train.max_skips": train.max_skips,
        "train.max_rollbacks": train.max_rollbacks,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "logging.layer_interval": logging.layer_interval,
        "device.threads": device.threads,
    }
    for key, value in at_least_0.items():
        if value < 0:
            yield f"{key}: {value} is negative; use 0 or more"

    if train.profile and PROFILED_FROM - 1 + train.profile > train.steps:
        yield (
            f"train.profile: {train.profile} steps from the fifth on are more than train.steps="
            f"{train.steps}; use 0, or at most {max(0, train.steps - PROFILED_FROM + 1)}"
        )

    if train.seed > _LARGEST_SEED:
        yield f"train.seed: {train.seed} is too large; use {_LARGEST_SEED} or less"

    above_0 = {
        "model.norm_eps": model.norm_eps,
        "model.rope_theta": model.rope_theta,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "logging.wandb.timeout_seconds": logging.wandb.timeout_seconds,
    }
    for key, value in above_0.items():
        if value <= 0:
            yield f"{key}: {value:g} is not positive; use a number above 0"

    below_1 = {
        "model.attention_dropout": model.attention_dropout,
        "model.hidden_dropout": model.hidden_dropout,
        "optim.beta1": optim.beta1,
        "optim.beta2": optim.beta2,
    }
    for key, value in below_1.items():
        if not 0 <= value < 1:
            yield f"{key}: {value:g} is outside [0, 1); use a number from 0 up to, not including, 1"

    up_to_1 = {
        "logging.alerts.dead_expert": logging.alerts.dead_expert,
        "logging.alerts.dead_neurons": logging.alerts.dead_neurons,
        "logging.alerts.load_collapse": logging.alerts.load_collapse,
        "logging.alerts.shrinking_weights": logging.alerts.shrinking_weights,
    }
    for key, value in up_to_1.items():
        if not 0 <= value <= 1:
            yield f"{key}: {value:g} is outside [0, 1]; use a number from 0 to 1"

    text = {
        "run.name": config.run.name,
        "run.dir": config.run.dir,
        "data.cache_dir": config.data.cache_dir,
        "checkpoint.resume": config.checkpoint.resume,
    }
    if logging.wandb.mode != "disabled":
        text["logging.wandb.project"] = logging.wandb.project
    for key, words in text.items():
        if not words.strip():
            yield f"{key}: empty; give it a value"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.attention == "mla":
        yield from _mla(model)
    elif model.head_dim == 0 and not _is_multiple(model.hidden_size, model.num_attention_heads):
        yield (
            f"model.hidden_size: {model.hidden_size} is not a multiple of "
            f"model.num_attention_heads={model.num_attention_heads}; use "
            f"{_near_multiples(model.hidden_size, model.num_attention_heads)}, or model.head_dim"
        )
    elif _head_dim(model) % 2:
        yield (
            f"model.head_dim: {_head_dim(model)} is odd and RoPE turns pairs; "
            f"use {_near_multiples(_head_dim(model), 2)}"
        )
    if not _is_multiple(model.num_attention_heads, model.num_query_groups):
        yield (
            f"model.num_query_groups: {model.num_query_groups} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}; "
            f"use {_near_divisors(model.num_attention_heads, model.num_query_groups)}"
        )
    if model.num_experts > 0:
        if model.experts_per_token > model.num_experts:
            yield (
                f"model.experts_per_token: {model.experts_per_token} is more than "
                f"model.num_experts={model.num_experts}; use {model.num_experts} or fewer"
            )
        if model.first_dense_layers >= model.num_layers:
            yield (
                f"model.first_dense_layers: {model.first_dense_layers} leaves no MoE layer of "
                f"model.num_layers={model.num_layers}; use {model.num_layers - 1} or fewer, or "
                "model.num_experts=0"
            )
    else:
        if model.first_dense_layers:
            yield (
                f"model.first_dense_layers: {model.first_dense_layers} has no effect with "
                "model.num_experts=0, where every layer is dense; use 0"
            )
        if model.shared_expert_ffn_hidden_size:
            yield (
                f"model.shared_expert_ffn_hidden_size: {model.shared_expert_ffn_hidden_size} needs "
                "experts, and model.num_experts=0; use 0"
            )
    if model.qk_norm_scope == "all_heads" and not model.qk_norm:
        yield (
            "model.qk_norm_scope: all_heads has no effect with model.qk_norm=false; use head, or "
            "model.qk_norm=true"
        )
    if model.shared_expert_gate and not model.shared_expert_ffn_hidden_size:
        yield (
            "model.shared_expert_gate: there is no shared expert to gate; "
            "set model.shared_expert_ffn_hidden_size, or model.shared_expert_gate=false"
        )


def _mla(model: ModelConfig) -> Iterator[str]:
    sizes = {
        "kv_lora_rank": model.mla.kv_lora_rank,
        "qk_nope_head_dim": model.mla.qk_nope_head_dim,
        "qk_rope_head_dim": model.mla.qk_rope_head_dim,
        "v_head_dim": model.mla.v_head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            yield f"model.mla.{name}: {size} is too small; use 1 or more"
    if model.mla.q_lora_rank < 0:
        yield f"model.mla.q_lora_rank: {model.mla.q_lora_rank} is negative; use 0 or more"
    if model.mla.qk_rope_head_dim % 2:
        yield (
            f"model.mla.qk_rope_head_dim: {model.mla.qk_rope_head_dim} is odd and RoPE turns "
            f"pairs; use {_near_multiples(model.mla.qk_rope_head_dim, 2)}"
        )
    if model.num_query_groups != model.num_attention_heads:
        yield (
            f"model.num_query_groups: {model.num_query_groups} with model.attention=mla, where each"
            f" head has its own keys; use {model.num_attention_heads}, as model.num_attention_heads"
        )
    if model.head_dim:
        yield (
            f"model.head_dim: {model.head_dim} is not read with model.attention=mla; use 0, and "
            "model.mla.qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
        )
    if model.qk_norm:
        yield (
            "model.qk_norm: true with model.attention=mla, which normalises its latents instead; "
            "use model.qk_norm=false"
        )
    if model.qkv_bias:
        yield (
            "model.qkv_bias: true with model.attention=mla, whose projections have no bias; "
            "use model.qkv_bias=false"
        )


def _rope_scaling(model: ModelConfig) -> Iterator[str]:
    scaling = model.rope_scaling
    if scaling.type == "none":
        return
    if model.attention != "mla":
        yield (
            f"model.rope_scaling.type: {scaling.type} needs model.attention=mla; use "
            "model.rope_scaling.type=none"
        )
    if scaling.factor <= 1:
        yield (
            f"model.rope_scaling.factor: {scaling.factor:g} does not lengthen anything; use a "
            "number above 1 such as 40"
        )
    if scaling.original_max_position < 1:
        yield (
            f"model.rope_scaling.original_max_position: {scaling.original_max_position} is too "
            "small; use 1 or more"
        )
    if not 0 < scaling.beta_slow < scaling.beta_fast:
        yield (
            f"model.rope_scaling.beta_fast: {scaling.beta_fast:g} and beta_slow="
            f"{scaling.beta_slow:g}; use beta_fast above beta_slow above 0, such as 32 and 1"
        )
    # Of one without the other transformers and megatron-core make different scales.
    if min(scaling.mscale, scaling.mscale_all_dim) < 0 or (
        (scaling.mscale == 0) != (scaling.mscale_all_dim == 0)
    ):
        yield (
            f"model.rope_scaling.mscale: {scaling.mscale:g} with mscale_all_dim="
            f"{scaling.mscale_all_dim:g}; use two numbers above 0, or 0 for both"
        )


def _router(config: Config) -> Iterator[str]:
    model, router = config.model, config.model.router
    kinds, coeffs = router.balance, router.balance_coeff
    if len(kinds) != len(coeffs):
        yield (
            f"model.router.balance_coeff: {len(coeffs)} coefficients for {len(kinds)} losses in "
            "model.router.balance; give one for each"
        )
    if not kinds:
        yield "model.router.balance: empty; use [none] with model.router.balance_coeff=[0.0]"
    for kind, count in Counter(kinds).items():
        if count > 1:
            yield f"model.router.balance: {kind} is listed {count} times; list it once"
    for alone in ("sinkhorn", "none"):
        if alone not in kinds:
            continue
        if len(kinds) > 1:
            yield f"model.router.balance: {alone} excludes every other entry; use [{alone}]"
        if any(coeffs):
            yield (
                f"model.router.balance_coeff: {_listed(coeffs)} with model.router.balance="
                f"[{alone}], which adds no loss; use [0.0]"
            )
    if any(coeff < 0 for coeff in coeffs):
        yield f"model.router.balance_coeff: {_listed(coeffs)} has a negative entry; use 0 or more"
    if model.num_experts < 1:
        return

    if not ROUTERS[router.kind].fixed_count and config.parallel.dispatcher == "flex":
        yield (
            f"parallel.dispatcher: flex needs as many experts for each token, and "
            f"model.router.kind={router.kind} gives them different numbers; use alltoall"
        )
    sigmoid = router.score_function == "sigmoid"
    if router.expert_bias and not sigmoid:
        yield (
            "model.router.expert_bias: needs model.router.score_function=sigmoid, which is "
            f"{router.score_function}; set sigmoid, or model.router.expert_bias=false"
        )
    if router.expert_bias and router.expert_bias_rate <= 0:
        yield (
            f"model.router.expert_bias_rate: {router.expert_bias_rate:g} never moves the bias; "
            "use a number above 0 such as 0.001"
        )
    if "sinkhorn" in kinds and sigmoid:
        yield (
            "model.router.score_function: sinkhorn has its own score; "
            "use softmax with model.router.balance=[sinkhorn]"
        )
    # A softmax over the single chosen logit is the constant 1: the router would get no gradient.
    if (
        model.experts_per_token == 1
        and not sigmoid
        and not router.pre_softmax
        and "sinkhorn" not in kinds
    ):
        yield (
            "model.router.pre_softmax: false with model.experts_per_token=1 gives the router no "
            "gradient; use model.router.pre_softmax=true"
        )
    if router.scaling_factor and not (sigmoid or router.pre_softmax):
        yield (
            f"model.router.scaling_factor: {router.scaling_factor:g} needs a sigmoid or "
            "pre-softmax router; use 0, or model.router.pre_softmax=true"
        )
    yield from _router_groups(model)


def _router_groups(model: ModelConfig) -> Iterator[str]:
    """Group-limited routing, which splits the experts into groups and a token visits a few."""
    groups, chosen = model.router.num_groups, model.router.group_topk
    if groups == 0 and chosen == 0:
        return
    if groups < 1 or chosen < 1:
        yield (
            f"model.router.group_topk: {chosen} with model.router.num_groups={groups}; "
            "set both above 0, or both to 0"
        )
        return
    if "sinkhorn" in model.router.balance:
        yield f"model.router.num_groups: {groups} is ignored by sinkhorn routing; use 0"
    if model.num_experts % groups:
        yield (
            f"model.router.num_groups: {groups} does not divide model.num_experts="
            f"{model.num_experts}; use {_near_divisors(model.num_experts, groups)}"
        )
    elif chosen > groups:
        yield (
            f"model.router.group_topk: {chosen} is more than model.router.num_groups={groups}; "
            f"use {groups} or fewer"
        )
    elif model.experts_per_token < chosen or model.experts_per_token % chosen:
        # Megatron ranks a group by its best experts_per_token // group_topk experts.
        yield (
            f"model.router.group_topk: {chosen} does not divide model.experts_per_token="
            f"{model.experts_per_token}; use {_near_divisors(model.experts_per_token, chosen)}"
        )
    elif model.experts_per_token // chosen > model.num_experts // groups:
        yield (
            f"model.router.group_topk: {chosen} groups of {model.num_experts // groups} experts "
            f"cannot give model.experts_per_token={model.experts_per_token}; use "
            f"{math.ceil(model.experts_per_token / (model.num_experts // groups))} or more"
        )


def _mone(config: Config) -> Iterator[str]:
    model, mone = config.model, config.mone
    if not 0 < mone.keep_ratio <= 1:
        yield f"mone.keep_ratio: {mone.keep_ratio:g} is outside (0, 1]; use a share such as 0.25"
    if not mone.enabled:
        return
    if not mone.apply_to:
        yield "mone.apply_to: empty with mone.enabled=true; use [routed], or mone.enabled=false"
    for target, count in Counter(mone.apply_to).items():
        if count > 1:
            yield f"mone.apply_to: {target} is listed {count} times; list it once"
    widths = _neuron_widths(model)
    missing = {
        "routed": model.num_experts < 1 and "model.num_experts=0; use [dense]",
        "shared": model.shared_expert_ffn_hidden_size < 1
        and "model.shared_expert_ffn_hidden_size=0; set it, or leave shared out",
        "dense": _dense_layers(model) < 1
        and "model.first_dense_layers=0; set it, or leave dense out",
    }
    for target in mone.apply_to:
        if missing[target]:
            yield f"mone.apply_to: {target} has nothing to select in, {missing[target]}"
            continue
        key, width = widths[target]
        if width > 0 and 0 < mone.keep_ratio <= 1:
            if count_kept(mone.keep_ratio, width) < 1:
                yield (
                    f"mone.keep_ratio: {mone.keep_ratio:g} of {key}={width} rounds to K=0 neurons; "
                    f"use {1 / width:.3g} or more"
                )
            else:
                yield from _rule_budget(mone, key, width)
    yield from _rule_options(mone)
    yield from _rule_layout(model, mone, config.parallel)
    yield from _rule_blocks(mone, config.parallel)
    yield from _keep_ratio_schedule(config)
    yield from _neuron_balance_layout(mone, config.parallel)
    yield from _packed_memory(model, mone, config.parallel)


def _neuron_widths(model: ModelConfig) -> dict[MoNETarget, tuple[str, int]]:
    """The key and the value of how many neurons the MLPs of each target have."""
    return {
        "routed": ("model.expert_ffn_hidden_size", model.expert_ffn_hidden_size),
        "shared": ("model.shared_expert_ffn_hidden_size", model.shared_expert_ffn_hidden_size),
        "dense": ("model.dense_ffn_hidden_size", model.dense_ffn_hidden_size),
    }


def _rule_options(mone: MoNEConfig) -> Iterator[str]:
    """Options that the rule does not have, or of another type."""
    rule = RULES[mone.rule]
    try:
        from_dict(rule.options, mone.rule_options)
    except ConfigError as error:
        names = ", ".join(keys(rule.options)) or "none"
        for problem in error.problems:
            yield f"mone.rule_options.{problem} (options of mone.rule={mone.rule}: {names})"


def _rule_budget(mone: MoNEConfig, key: str, width: int) -> Iterator[str]:
    """What the rule refuses of an MLP of ``width`` neurons."""
    rule = RULES[mone.rule]
    try:
        options: object = from_dict(rule.options, mone.rule_options)
        rule.check(Budget(mone.keep_ratio, width, options))
    except ConfigError:
        return  # told by itself
    except ValueError as error:
        yield f"{error} ({key}={width})"


def _neuron_splits(
    mone: MoNEConfig, parallel: ParallelConfig
) -> Iterator[tuple[MoNETarget, str, int]]:
    """Yields each target with the ``parallel`` key and the ranks that its neurons are spread by."""
    for target in mone.apply_to:
        routed = target == "routed"
        key, size = (
            ("expert_tensor", parallel.expert_tensor) if routed else ("tensor", parallel.tensor)
        )
        yield target, key, size


def _rule_layout(model: ModelConfig, mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Layouts that spread neurons over ranks which the rule cannot select over."""
    rule = RULES[mone.rule]
    widths = _neuron_widths(model)
    for target, key, size in _neuron_splits(mone, parallel):
        try:
            budget = rule.budget(mone.keep_ratio, widths[target][1], mone.rule_options)
        except ValueError:
            continue  # told by itself
        if problem := rule.shard_problem(budget, size):
            yield (
                f"parallel.{key}: {size} spreads the neurons of the {target} MLPs over ranks, and "
                f"{problem}; use parallel.{key}=1"
            )


def _rule_blocks(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Layouts that split the rows of a microbatch over copies of an expert, whole for the rule."""
    if not RULES[mone.rule].reads_batch:
        return
    batch = parallel.tensor * parallel.context
    if "routed" in mone.apply_to and not _is_multiple(
        parallel.expert * parallel.expert_tensor, batch
    ):
        yield (
            f"mone.rule: {mone.rule} ranks the neurons of all tokens that an expert gets of a "
            f"microbatch, which parallel.tensor*context={batch} ranks share while parallel.expert="
            f"{parallel.expert} brings them together on fewer; use parallel.expert="
            f"{_near_multiples(parallel.expert, batch)}"
        )
    if set(mone.apply_to) != {"routed"} and parallel.context > 1:
        yield (
            f"mone.rule: {mone.rule} ranks the neurons of all tokens of a microbatch, which "
            f"parallel.context={parallel.context} splits over ranks; use parallel.context=1, or "
            "mone.apply_to=[routed]"
        )


def _packed_memory(model: ModelConfig, mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What packed mode has no room for, and what it forgets that something needs."""
    if mone.memory == "full":
        return
    rule, widths = RULES[mone.rule], _neuron_widths(model)
    for target in mone.apply_to:
        key, width = widths[target]
        try:
            budget = rule.budget(mone.keep_ratio, width, mone.rule_options)
        except ValueError:
            continue  # told by itself
        if budget.kept < width and rule.most_kept(budget) >= width:
            yield (
                f"mone.memory: packed saves nothing with mone.rule={mone.rule}, which may keep all "
                f"{width} neurons of a row ({key}); use mone.memory=full"
            )
    if mone.balance.coeff == 0:
        return
    if mone.balance.weights == "all":
        yield (
            "mone.memory: packed forgets the neurons that are not kept, and the balance loss "
            "weighs them with mone.balance.weights=all; use weights=selected, or mone.memory=full"
        )
    for target, key, size in _neuron_splits(mone, parallel):
        if size > 1:
            yield (
                f"mone.memory: packed saves nothing with a neuron balance loss where parallel.{key}"
                f"={size} splits the neurons ({target}); use mone.memory=full, or parallel.{key}=1"
            )


def _keep_ratio_schedule(config: Config) -> Iterator[str]:
    mone, steps = config.mone, config.mone.keep_ratio_steps
    if mone.keep_ratio_schedule == "constant":
        if steps:
            yield f"mone.keep_ratio_steps: {steps} needs mone.keep_ratio_schedule=linear or cosine"
        return
    if not mone.keep_ratio <= mone.keep_ratio_start <= 1:
        yield (
            f"mone.keep_ratio_start: {mone.keep_ratio_start:g} is not between mone.keep_ratio="
            f"{mone.keep_ratio:g} and 1; a schedule goes down"
        )
    if not 1 <= steps <= config.train.steps:
        yield (
            f"mone.keep_ratio_steps: {steps} is not between 1 and train.steps={config.train.steps}"
        )
        return
    yield from _scheduled_budgets(config.model, mone)


def _scheduled_budgets(model: ModelConfig, mone: MoNEConfig) -> Iterator[str]:
    """What the rule refuses on the way to the keep ratio, which it takes: whole neurons, say."""
    widths = _neuron_widths(model)
    if any(list(_rule_budget(mone, *widths[target])) for target in mone.apply_to):
        return  # told by itself
    for step in range(1, mone.keep_ratio_steps + 1):
        then = replace(mone, keep_ratio=mone.keep_ratio_at(step))
        for target in mone.apply_to:
            for problem in _rule_budget(then, *widths[target]):
                yield (
                    f"mone.keep_ratio_schedule: {mone.keep_ratio_schedule} comes to ratios that "
                    f"mone.rule={mone.rule} refuses, at step {step} the first ({problem}); use "
                    "mone.keep_ratio_schedule=constant"
                )
                return


def _neuron_balance_layout(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    # An expert's tokens come from the ranks of one micro-batch or of several whole ones only when
    # the group that shares a micro-batch and the one that shares the experts nest.
    batch = parallel.tensor * parallel.context
    experts = parallel.expert * parallel.expert_tensor
    if mone.balance.coeff > 0 and not (
        _is_multiple(experts, batch) or _is_multiple(batch, experts)
    ):
        yield (
            f"mone.balance.coeff: {mone.balance.coeff:g} needs parallel.tensor*context={batch} and "
            f"parallel.expert*expert_tensor={experts} to divide one another; use parallel.expert="
            f"{_near_multiples(parallel.expert, batch // math.gcd(batch, parallel.expert_tensor))}"
            ", or mone.balance.coeff=0"
        )


def _data(config: Config) -> Iterator[str]:
    data, model = config.data, config.model
    if len(data.weights) not in (0, len(data.paths)):
        yield (
            f"data.weights: {len(data.weights)} weights for {len(data.paths)} data.paths; "
            "give one for each path, or none"
        )
    if any(weight <= 0 for weight in data.weights):
        yield (
            f"data.weights: {_listed(data.weights)} has an entry that is not above 0; raise it, or "
            "leave its path out"
        )
    elif not math.isfinite(total := sum(data.weights)):
        yield f"data.weights: {_listed(data.weights)} are too large to add up; divide all of them"
    elif data.weights and min(data.weights) / total == 0:
        yield (
            f"data.weights: {min(data.weights):g} of {total:g} is too small a share to be a "
            "number; raise it, or leave its path out"
        )
    if len(data.paths) > _MOST_SOURCES:
        yield (
            f"data.paths: {len(data.paths)} paths are too many; use {_MOST_SOURCES} or fewer "
            "(tools/preprocess_data.py takes many files into one)"
        )
    if any(not path.strip() for path in data.paths):
        yield "data.paths: has an empty path; give the path of a .bin/.idx pair without extension"
    if any(share < 0 for share in data.split):
        yield f"data.split: {_listed(data.split)} has a negative share; use 0 or more"
    elif sum(data.split) <= 0:
        yield f"data.split: {_listed(data.split)} sums to 0; use such as [0.95, 0.05, 0.0]"
    elif data.split[0] <= 0:
        yield f"data.split: {_listed(data.split)} leaves nothing to train on; raise the first share"
    elif config.train.eval_interval > 0 and data.split[1] <= 0:
        yield (
            f"data.split: {_listed(data.split)} has no validation share and train.eval_interval="
            f"{config.train.eval_interval}; raise the second share, or train.eval_interval=0"
        )
    source = SOURCES[data.source]
    if source.reads_paths:
        if not data.paths:
            yield (
                f"data.paths: empty with data.source={source.name}; make data with "
                "tools/preprocess_data.py and give its path without extension, or data=stdlib"
            )
        return
    if data.paths:
        yield (
            f"data.paths: not read with data.source={source.name}; use data=indexed, or "
            "data.paths=[]"
        )
    if data.vocab_size < _SMALLEST_BPE:
        yield (
            f"data.vocab_size: {data.vocab_size} cannot hold the 256 bytes and end-of-text; "
            f"use {_SMALLEST_BPE} or more"
        )
    elif 0 < model.vocab_size < data.vocab_size:
        yield (
            f"model.vocab_size: {model.vocab_size} is smaller than data.vocab_size="
            f"{data.vocab_size}, so tokens would fall past it; use 0 or {data.vocab_size} or more"
        )


def _schedule(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr: {optim.min_lr:g} is above optim.lr={optim.lr:g}; use optim.lr or less"
    if not 0 < optim.decay_fraction <= 1:
        yield (
            f"optim.decay_fraction: {optim.decay_fraction:g} is outside (0, 1]; "
            "use a share such as 0.1"
        )
    elif 0 < steps <= optim.warmup_steps:
        yield (
            f"optim.warmup_steps: {optim.warmup_steps} is not below train.steps={steps}; "
            f"use {steps - 1} or fewer, or more train.steps"
        )
    elif optim.schedule == "wsd" and optim.warmup_steps + optim.decay_fraction * steps > steps:
        yield (
            f"optim.decay_fraction: {optim.decay_fraction:g} of train.steps={steps} after "
            f"optim.warmup_steps={optim.warmup_steps} does not fit; use "
            f"{1 - optim.warmup_steps / steps:.3g} or less"
        )


def _loss_faults(config: Config) -> Iterator[str]:
    train = config.train
    if train.spike_factor != 0 and train.spike_factor <= 1:
        yield (
            f"train.spike_factor: {train.spike_factor:g} would call an ordinary loss a spike; "
            "use a factor above 1 such as 3, or 0 for no check"
        )
    if train.on_bad_loss == "rollback" and config.checkpoint.interval == 0:
        yield (
            "checkpoint.interval: 0 leaves train.on_bad_loss=rollback nothing to go back to; "
            "set checkpoint.interval, or train.on_bad_loss=skip"
        )


def _hooks(config: Config) -> Iterator[str]:
    hooks = config.train.hooks
    for name in sorted({name for name in hooks if hooks.count(name) > 1}):
        yield f"train.hooks: {name} is named {hooks.count(name)} times; name it once"


def _eval_tasks(config: Config) -> Iterator[str]:
    train = config.train
    if not train.eval_tasks:
        if train.eval_tasks_interval:
            yield (
                f"train.eval_tasks_interval: {train.eval_tasks_interval} with no train.eval_tasks; "
                "name some, or use 0"
            )
        return
    if train.eval_tasks_interval == 0:
        yield (
            "train.eval_tasks_interval: 0 never runs train.eval_tasks; use a number of steps, or "
            "train.eval_tasks=[]"
        )
    if config.parallel.context > 1:
        yield (
            f"train.eval_tasks: not with parallel.context={config.parallel.context}, which splits "
            "sequences; use tools/eval_hf.py on a checkpoint"
        )
    for package in ("lm_eval", "transformers"):
        if importlib.util.find_spec(package) is None:
            yield (
                f"train.eval_tasks: needs {package}, which is not installed; "
                "pip install -e '.[hf]', or train.eval_tasks=[]"
            )


def _checkpoint(checkpoint: CheckpointConfig) -> Iterator[str]:
    if checkpoint.initialize and checkpoint.resume not in ("never", "auto"):
        yield (
            f"checkpoint.initialize: has no effect on a run that goes on from checkpoint.resume="
            f"{checkpoint.resume}; use one of them, or checkpoint.resume=auto"
        )


def _sharding(config: Config) -> Iterator[str]:
    """Model sizes against the parallel sizes that split them."""
    model, parallel, train = config.model, config.parallel, config.train
    tensor = parallel.tensor
    split = [
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tensor", tensor),
        ("model.num_query_groups", model.num_query_groups, "parallel.tensor", tensor),
        ("model.vocab_padding_multiple", model.vocab_padding_multiple, "parallel.tensor", tensor),
        ("model.shared_expert_ffn_hidden_size", model.shared_expert_ffn_hidden_size,
         "parallel.tensor", tensor),
    ]  # fmt: skip
    if _dense_layers(model) > 0:
        width = model.dense_ffn_hidden_size
        split.append(("model.dense_ffn_hidden_size", width, "parallel.tensor", tensor))
    if model.num_experts > 0:
        split.append(("model.num_experts", model.num_experts, "parallel.expert", parallel.expert))
        split.append(
            ("model.expert_ffn_hidden_size", model.expert_ffn_hidden_size,
             "parallel.expert_tensor", parallel.expert_tensor)
        )  # fmt: skip
    for key, size, by, ways in split:
        if not _is_multiple(size, ways):
            yield (
                f"{by}: {ways} does not divide {key}={size}; use {by}={_near_divisors(size, ways)}"
                f", or {key}={_near_multiples(size, ways)}"
            )
    if model.num_experts == 0:
        for name, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size > 1:
                yield f"parallel.{name}: {size} splits experts and model.num_experts=0; use 1"

    stages = parallel.pipeline * parallel.virtual_pipeline
    if not _is_multiple(model.num_layers, stages):
        yield (
            f"parallel.pipeline: model.num_layers={model.num_layers} is not a multiple of "
            f"parallel.pipeline*virtual_pipeline={stages}; use model.num_layers="
            f"{_near_multiples(model.num_layers, stages)}, or stages that divide "
            f"{model.num_layers} ({_near_divisors(model.num_layers, stages)})"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} interleaves a pipeline and "
            "parallel.pipeline=1; use parallel.virtual_pipeline=1, or parallel.pipeline=2 or more"
        )

    # Context parallelism gives each rank two pieces of the sequence, to balance the causal mask.
    pieces = tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if not _is_multiple(train.seq_length, pieces):
        made_of = "parallel.tensor*2*context" if parallel.context > 1 else "parallel.tensor"
        yield (
            f"train.seq_length: {train.seq_length} is not a multiple of {made_of}={pieces}; "
            f"use {_near_multiples(train.seq_length, pieces)}"
        )


def _world(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    model_size, expert_size = model_parallel_size(parallel), expert_parallel_size(parallel)
    if model_size < 1 or expert_size < 1:
        return
    smallest = smallest_world_size(parallel)
    fix = f"run {_near_multiples(world_size, smallest)} processes, or change the sizes"
    for names, size in (
        (("tensor", "pipeline", "context"), model_size),
        (("expert", "expert_tensor", "pipeline"), expert_size),
    ):
        if not _is_multiple(world_size, size):
            yield (
                f"parallel.{_largest(parallel, *names)}: world size {world_size} is not a multiple "
                f"of parallel.{'*'.join(names)}={size}; {fix}"
            )


def _batch(config: Config, world_size: int) -> Iterator[str]:
    train, parallel = config.train, config.parallel
    model_size = model_parallel_size(parallel)
    batch, micro = train.global_batch_size, train.micro_batch_size
    if min(model_size, batch, micro) < 1 or world_size % model_size or world_size < 1:
        return
    data = world_size // model_size
    if batch % (micro * data):
        fixes = [f"train.global_batch_size={_near_multiples(batch, micro * data)}"]
        if batch % data == 0:
            fixes.append(f"train.micro_batch_size={_near_divisors(batch // data, micro)}")
        # The largest number of processes, at most those there are, that the batch can feed.
        smallest = smallest_world_size(parallel)
        for fewer in range(world_size - world_size % smallest, 0, -smallest):
            if batch % (micro * (fewer // model_size)) == 0:
                fixes.append(f"{fewer} process{'es' if fewer > 1 else ''}")
                break
        yield (
            f"train.global_batch_size: {batch} is not a multiple of train.micro_batch_size={micro} "
            f"* data-parallel size {data} ({world_size} processes / parallel.tensor*pipeline*"
            f"context={model_size}); use {', or '.join(fixes)}"
        )
        return
    microbatches = batch // (micro * data)
    # The interleaved schedule runs micro-batches in groups of the pipeline's size.
    if parallel.virtual_pipeline > 1 and not _is_multiple(microbatches, parallel.pipeline):
        yield (
            f"parallel.virtual_pipeline: {microbatches} micro-batches a step are not a multiple of "
            f"parallel.pipeline={parallel.pipeline}; use train.global_batch_size="
            f"{_near_multiples(batch, micro * data * parallel.pipeline)}, or "
            "parallel.virtual_pipeline=1"
        )


def _device(
    config: Config, num_devices: int | None, local_world_size: int | None, *, cpu: bool
) -> Iterator[str]:
    if config.device.kind == "cuda" and num_devices == 0:
        yield "device.kind: cuda, and this machine has no CUDA device; use device.kind=cpu"
    elif not cpu and num_devices and local_world_size and local_world_size > num_devices:
        yield (
            f"device.kind: {local_world_size} processes on this machine and {num_devices} CUDA "
            f"devices; run {num_devices} processes or fewer, or device.kind=cpu"
        )


def _backend(
    config: Config, *, cpu: bool, transformer_engine: bool, deep_ep: bool
) -> Iterator[str]:
    """Options that need a package, a device or one another."""
    parallel = config.parallel
    if parallel.context > 1 and not transformer_engine:
        yield (
            f"parallel.context: {parallel.context} needs Transformer Engine, which is not "
            "installed; use parallel.context=1, or install transformer_engine"
        )
    elif parallel.context > 1 and config.model.attention == "mla":
        yield (
            f"parallel.context: {parallel.context} with model.attention=mla is not supported; "
            "use parallel.context=1"
        )
    if config.device.grouped_gemm == "transformer_engine":
        if cpu:
            yield "device.grouped_gemm: Transformer Engine needs CUDA; use torch on a CPU"
        elif not transformer_engine:
            yield (
                "device.grouped_gemm: Transformer Engine is not installed; use torch, or install "
                "transformer_engine"
            )
    if parallel.dispatcher == "flex":
        if cpu:
            yield "parallel.dispatcher: flex needs CUDA; use alltoall or allgather on a CPU"
        elif not deep_ep:
            yield (
                "parallel.dispatcher: flex needs DeepEP, which is not installed; "
                "use alltoall, or install deep_ep"
            )
        if parallel.expert * parallel.expert_tensor == 1:
            yield (
                "parallel.dispatcher: flex needs parallel.expert*expert_tensor above 1; "
                "use alltoall"
            )
        if config.model.router.dtype == "fp64":
            yield "model.router.dtype: the flex dispatcher takes fp32 probabilities; use fp32"
    overlaps = {
        "parallel.overlap_grad_reduce": parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather": parallel.overlap_param_gather,
    }
    for key, wanted in overlaps.items():
        if wanted and cpu:
            yield f"{key}: overlaps CUDA streams; use false on a CPU"
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield (
            "parallel.overlap_param_gather: needs parallel.distributed_optimizer=true; "
            "set it, or parallel.overlap_param_gather=false"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce=true; "
            "set it, or parallel.overlap_param_gather=false"
        )


def _alignment(config: Config, *, bf16: bool) -> Iterator[str]:
    """Strides of the grouped expert matrices, in elements of the training dtype."""
    model, parallel = config.model, config.parallel
    if model.num_experts < 1 or parallel.expert_tensor < 1:
        return
    step = _GROUPED_MM_ALIGNMENT // (2 if bf16 else 4)
    dtype = "bf16" if bf16 else "fp32"
    shards = parallel.expert_tensor
    if not _is_multiple(model.hidden_size, step):
        yield (
            f"model.hidden_size: {model.hidden_size} is not a multiple of {step}, which grouped "
            f"expert matrices in {dtype} need; use {_near_multiples(model.hidden_size, step)}"
        )
    width = model.expert_ffn_hidden_size
    if _is_multiple(width, shards) and not _is_multiple(width, step * shards):
        yield (
            f"model.expert_ffn_hidden_size: {width} / parallel.expert_tensor={shards} is not a "
            f"multiple of {step}, which grouped expert matrices in {dtype} need; "
            f"use {_near_multiples(width, step * shards)}"
        )


def _is_bf16(config: Config, num_devices: int | None, *, cpu: bool) -> bool:
    if config.device.dtype != "auto":
        return config.device.dtype == "bf16"
    on_cuda = config.device.kind == "cuda" or (num_devices or 0) > 0
    return on_cuda and not cpu


def _dense_layers(model: ModelConfig) -> int:
    return (
        min(model.first_dense_layers, model.num_layers) if model.num_experts else model.num_layers
    )


def _head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.hidden_size // max(model.num_attention_heads, 1)


def _is_multiple(value: int, of: int) -> bool:
    # A size below 1 has its own line already.
    return of < 1 or value < 0 or value % of == 0


def _near_multiples(value: int, of: int) -> str:
    """The multiples of ``of`` around ``value``: "6 or 9" for 7 and 3."""
    below = value // of * of
    return f"{below} or {below + of}" if below > 0 else str(of)


def _near_divisors(value: int, near: int) -> str:
    """The divisors of ``value`` around ``near``: "2 or 4" for 8 and 3."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(str(d) for d in below + above) or str(value)


def _largest(parallel: ParallelConfig, *names: str) -> str:
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor,
    }
    return max(names, key=lambda name: sizes[name])


def _listed(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
