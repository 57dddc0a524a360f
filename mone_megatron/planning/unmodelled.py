"""Says of every key that memory and time are planned without why, or when a plan must say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mone_megatron.config.schema import Config
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES

# Keys, and groups that end with a dot, which change neither what a rank keeps on its GPU nor what
# it does in a step, by more than a few numbers a token.
NO_WEIGHT = (
    "run.",
    "logging.",
    "checkpoint.",
    # Read on the host, before the step needs it.
    "data.source",
    "data.paths",
    "data.weights",
    "data.split",
    "data.tokenizer",
    "data.max_megabytes",
    "data.cache_dir",
    "data.num_workers",
    # Numbers in what is computed anyway.
    "model.norm_eps",
    "model.rope_theta",
    "model.rope_scaling.",
    "model.init_std",
    "model.mtp.coeff",
    "model.router.options",
    "model.router.top_p",
    "model.router.threshold",
    "model.router.balance",
    "model.router.expert_bias",
    "model.router.expert_bias_rate",
    "model.router.scaling_factor",
    "mone.balance.kind",
    "mone.balance.weights",
    "optim.lr",
    "optim.min_lr",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.decay_fraction",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.clip_grad",
    # Between steps, or only now and then.
    "train.seed",
    "train.steps",
    "train.eval_at_start",
    "train.eval_interval",
    "train.eval_steps",
    "train.eval_tasks",
    "train.eval_tasks_interval",
    "train.eval_tasks_limit",
    "train.profile",
    "train.exit_after_minutes",
    "train.on_bad_loss",
    "train.spike_factor",
    "train.max_skips",
    "train.max_rollbacks",
    # Plans are of GPUs.
    "device.kind",
    "device.threads",
    "device.timeout_seconds",
)

# Key, or a group of keys that one of them turns on -> whether it changes memory or time.
NOT_MODELLED: Mapping[str, Callable[[Config], bool]] = {
    "model.attention_dropout": lambda config: config.model.attention_dropout > 0,
    "model.attention_sink": lambda config: (
        config.model.attention_sink != "none" and config.model.attention == "mla"
    ),
    "model.router.kind": lambda config: (
        config.model.num_experts > 0 and not ROUTERS[config.model.router.kind].fixed_count
    ),
    "model.router.num_groups": lambda config: config.model.router.num_groups > 0,
    "model.router.group_topk": lambda config: False,  # of the groups above
    "model.router.density.": lambda config: False,  # of the routers above
    "mone.rule": lambda config: config.mone.enabled and not RULES[config.mone.rule].top_k,
    "mone.rule_options": lambda config: False,  # of the rule above
    "mone.density.": lambda config: config.mone.enabled and config.mone.density.step != "off",
    "mone.straight_through": lambda config: config.mone.enabled and config.mone.straight_through,
    "mone.balance.scope": lambda config: (
        config.mone.enabled and config.mone.balance.scope != "microbatch"
    ),
    "mone.keep_ratio_schedule": lambda config: (
        config.mone.enabled and config.mone.keep_ratio_schedule != "constant"
    ),
    "mone.keep_ratio_start": lambda config: False,  # of the schedule above
    "mone.keep_ratio_steps": lambda config: False,
    "optim.name": lambda config: config.optim.name == "muon",  # its products, not its state
    "train.hooks": lambda config: bool(config.train.hooks),
    "device.kernels": lambda config: config.device.kernels == "reference",
    "device.grouped_gemm": lambda config: config.device.grouped_gemm == "transformer_engine",
}


def unmodelled(config: Config) -> list[str]:
    """Returns the keys that are set and that memory or time are planned without."""
    given = [
        f"megatron.{part}.{name}"
        for part, fields in config.megatron.given().items()
        for name in fields
    ]
    return [key.rstrip(".") for key, is_set in NOT_MODELLED.items() if is_set(config)] + given
