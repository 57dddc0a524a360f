"""Checks that what a density controller is to steer is there, and decides the density."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.density import coefficient_problems, steered_start
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields what a controller that is on lacks."""
    mone = config.mone
    if not mone.enabled or DENSITY_STEPS[mone.density.step].factor is None:
        return
    if mone.keep_ratio == 1:
        yield (
            f"mone.density.step: {mone.density.step} measures no density where mone.keep_ratio=1 "
            "keeps all neurons; use a smaller mone.keep_ratio, or mone.density.step=off"
        )
    if mone.density.steers == "sparsity_coeff":
        yield from _coefficient(config)
    else:
        yield from _state(config)


def _coefficient(config: Config) -> Iterator[str]:
    """Yields why the coefficient of the sparsity loss is not free, or decides nothing."""
    model, mone = config.model, config.mone
    if RULES[mone.rule].keeps_budget:
        others = " or ".join(RULES[mone.rule].steerable)
        fix = f"mone.density.steers={others}" if others else "mone.rule=nonzero"
        yield (
            f"mone.density.steers: sparsity_coeff decides no density with mone.rule={mone.rule}, "
            f"which comes to one by itself; use {fix}"
        )
        return
    if "routed" not in mone.apply_to:
        yield (
            "mone.density.steers: sparsity_coeff is of a loss on routed experts, which "
            "mone.apply_to leaves out; use mone.apply_to=[routed]"
        )
    if SPARSITY_LOSSES[model.sparsity_loss].function is None:
        yield (
            "mone.density.steers: sparsity_coeff needs a loss; set model.sparsity_loss=l1, or "
            "mone.density.step=off"
        )
    if model.sparsity_coeff:
        yield (
            f"model.sparsity_coeff: {model.sparsity_coeff:g} is what mone.density steers; use 0, "
            f"and mone.density.start={model.sparsity_coeff:g} to begin there"
        )
    yield from coefficient_problems(mone.density, "mone.density")


def _state(config: Config) -> Iterator[str]:
    """Yields why a number of the rule's state cannot be steered."""
    mone, rule = config.mone, RULES[config.mone.rule]
    steerable = rule.steerable.get(mone.density.steers)
    if steerable is None:
        known = {name: other.name for other in RULES for name in other.steerable}
        theirs = ", ".join(f"{name} (mone.rule={other})" for name, other in known.items())
        yield (
            f"mone.density.steers: {mone.density.steers!r} is nothing that mone.rule={rule.name} "
            f"has; use sparsity_coeff (mone.rule=nonzero), {theirs}"
        )
        return
    option = steerable.unless
    if option is not None and mone.rule_options.get(option):
        yield (
            f"mone.rule_options.{option}: {mone.rule_options[option]} is fixed, and mone.density "
            f"steers it; leave it out, and set mone.density.start to begin there"
        )
    if mone.density.cap != type(mone.density)().cap:
        yield (
            f"mone.density.cap: {mone.density.cap:g} has no effect with mone.density.steers="
            f"{mone.density.steers}, whose largest value the rule says; leave it out"
        )
    if steered_start(mone.density, steerable.start) > steerable.largest:
        yield (
            f"mone.density.start: {mone.density.start:g} is more than {mone.density.steers} can be "
            f"with mone.rule={rule.name}; use {steerable.largest:g} or less"
        )
