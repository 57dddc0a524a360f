"""Checks schedules against the number of steps that they run over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mone_megatron.config.checks.neurons import neuron_widths, rule_budget
from mone_megatron.config.model import ModelConfig
from mone_megatron.config.mone import MoNEConfig
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields schedules that do not fit into the steps of the run."""
    yield from _learning_rate(config)
    yield from _keep_ratio(config)


def _learning_rate(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    if not 0 < optim.decay_fraction <= 1:
        return
    if 0 < steps <= optim.warmup_steps:
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


def _keep_ratio(config: Config) -> Iterator[str]:
    mone, steps = config.mone, config.mone.keep_ratio_steps
    scheduled = mone.enabled and mone.keep_ratio_schedule != "constant"
    if not scheduled:
        return
    if not 1 <= steps <= config.train.steps:
        yield (
            f"mone.keep_ratio_steps: {steps} is not between 1 and train.steps={config.train.steps}"
        )
        return
    yield from _scheduled_budgets(config.model, mone)


def _scheduled_budgets(model: ModelConfig, mone: MoNEConfig) -> Iterator[str]:
    """Yields what the rule refuses on the way to a keep ratio that it takes."""
    widths = neuron_widths(model)
    if any(list(rule_budget(mone, *widths[target])) for target in mone.apply_to):
        return  # told by itself
    for step in range(1, mone.keep_ratio_steps + 1):
        then = replace(mone, keep_ratio=mone.keep_ratio_at(step))
        for target in mone.apply_to:
            for problem in rule_budget(then, *widths[target]):
                yield (
                    f"mone.keep_ratio_schedule: {mone.keep_ratio_schedule} comes to ratios that "
                    f"mone.rule={mone.rule} refuses, at step {step} the first ({problem}); use "
                    "mone.keep_ratio_schedule=constant"
                )
                return
