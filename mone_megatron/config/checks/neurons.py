"""Checks neuron selection against the widths of MLPs and the ranks that share their neurons."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mone_megatron.config.convert import from_dict
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.model import ModelConfig
from mone_megatron.config.mone import MoNEConfig, MoNETarget
from mone_megatron.config.parallel import ParallelConfig
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.wording import is_multiple, near_multiples
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.rule import Budget, count_kept
from mone_megatron.methods.rules import RULES


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields what the model and the layout do not give a selection that is enabled."""
    yield from _rectified_up(config)
    if not config.mone.enabled:
        return
    yield from _targets(config)
    yield from _rule_layout(config.model, config.mone, config.parallel)
    yield from _rule_blocks(config.mone, config.parallel)
    yield from _rule_tokens(config.mone, config.parallel)
    yield from _rows_of_no_token(config)
    yield from _packed_room(config.model, config.mone)
    yield from _balance_layout(config.mone, config.parallel)
    yield from _packed_layout(config.mone, config.parallel)


def _rectified_up(config: Config) -> Iterator[str]:
    """Yields MLPs of megatron-core's own, which take the up projection as it is."""
    model, mone = config.model, config.mone
    if ACTIVATIONS[model.activation].up is None:
        return
    there: dict[MoNETarget, tuple[str, int]] = {
        "shared": ("model.shared_expert_ffn_hidden_size", model.shared_expert_ffn_hidden_size),
        "dense": ("model.first_dense_layers", model.dense_layers),
    }
    for target, (key, count) in there.items():
        if count > 0 and not (mone.enabled and target in mone.apply_to):
            yield (
                f"model.activation: {model.activation} changes the up projection, which {target} "
                f"MLPs that keep all neurons do not compute; use {key}=0, or mone.enabled=true "
                f"with {target} in mone.apply_to"
            )


def neuron_widths(model: ModelConfig) -> dict[MoNETarget, tuple[str, int]]:
    """Returns the key and the value of how many neurons the MLPs of each target have."""
    return {
        "routed": ("model.expert_ffn_hidden_size", model.expert_ffn_hidden_size),
        "shared": ("model.shared_expert_ffn_hidden_size", model.shared_expert_ffn_hidden_size),
        "dense": ("model.dense_ffn_hidden_size", model.dense_ffn_hidden_size),
    }


def _targets(config: Config) -> Iterator[str]:
    """Yields targets that the model does not have, and those with too few neurons."""
    model, mone = config.model, config.mone
    widths = neuron_widths(model)
    if model.experts == "product_key":
        yield (
            "mone.enabled: true selects neurons of an expert, and those of model.experts="
            "product_key have one each; use mone.enabled=false"
        )
        return
    missing = {
        "routed": model.num_experts < 1 and "model.num_experts=0; use [dense]",
        "shared": model.shared_expert_ffn_hidden_size < 1
        and "model.shared_expert_ffn_hidden_size=0; set it, or leave shared out",
        "dense": model.dense_layers < 1
        and "model.first_dense_layers=0; set it, or leave dense out",
    }
    for target in mone.apply_to:
        if missing[target]:
            yield f"mone.apply_to: {target} has nothing to select in, {missing[target]}"
            continue
        key, width = widths[target]
        if width > 0 and mone.keep_ratio > 0 and count_kept(mone.keep_ratio, width) < 1:
            yield (
                f"mone.keep_ratio: {mone.keep_ratio:g} of {key}={width} rounds to K=0 neurons; "
                f"use {1 / width:.3g} or more"
            )
        else:
            yield from rule_budget(mone, key, width)


def rule_budget(mone: MoNEConfig, key: str, width: int) -> Iterator[str]:
    """Yields what the rule refuses of an MLP of ``width`` neurons."""
    if width < 1 or not 0 < mone.keep_ratio <= 1:
        return  # The groups themselves tell what is wrong with the sizes.
    rule = RULES[mone.rule]
    try:
        options: object = from_dict(rule.options, mone.rule_options)
        rule.check(Budget(mone.keep_ratio, width, options))
    except ConfigError:
        return  # The group itself tells what is wrong with the options.
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
    """Yields layouts that spread neurons over ranks which the rule cannot select over."""
    rule = RULES[mone.rule]
    widths = neuron_widths(model)
    for target, key, size in _neuron_splits(mone, parallel):
        width = widths[target][1]
        if min(width, size) < 1 or not 0 < mone.keep_ratio <= 1:
            continue  # The groups themselves tell what is wrong with the sizes.
        try:
            budget = rule.budget(mone.keep_ratio, width, mone.rule_options)
        except ValueError:
            continue  # The group itself tells what is wrong with the options.
        if problem := rule.shard_problem(budget, size):
            yield (
                f"parallel.{key}: {size} spreads the neurons of the {target} MLPs over ranks, and "
                f"{problem}; use parallel.{key}=1"
            )


def _rule_blocks(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yields layouts that split the rows of a microbatch, which the rule needs whole."""
    if not RULES[mone.rule].reads_batch:
        return
    batch = parallel.tensor * parallel.context
    if "routed" in mone.apply_to and not is_multiple(
        parallel.expert * parallel.expert_tensor, batch
    ):
        yield (
            f"mone.rule: {mone.rule} ranks the neurons of all tokens that an expert gets of a "
            f"microbatch, which parallel.tensor*context={batch} ranks share while parallel.expert="
            f"{parallel.expert} brings them together on fewer; use parallel.expert="
            f"{near_multiples(parallel.expert, batch)}"
        )
    if set(mone.apply_to) != {"routed"} and parallel.context > 1:
        yield (
            f"mone.rule: {mone.rule} ranks the neurons of all tokens of a microbatch, which "
            f"parallel.context={parallel.context} splits over ranks; use parallel.context=1, or "
            "mone.apply_to=[routed]"
        )


def _rule_tokens(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yields layouts that spread the experts of a token, which the rule ranks together."""
    if not RULES[mone.rule].pools or "routed" not in mone.apply_to:
        return
    if parallel.expert > 1:
        yield (
            f"parallel.expert: {parallel.expert} spreads the experts of a token over ranks, and "
            f"mone.rule={mone.rule} ranks their neurons together; use parallel.expert=1"
        )
    if parallel.dispatcher == "flex":
        yield (
            f"parallel.dispatcher: flex does not tell which token a row is of, and mone.rule="
            f"{mone.rule} ranks the rows of a token together; use alltoall or allgather"
        )


def _rows_of_no_token(config: Config) -> Iterator[str]:
    """Yields that experts would be given empty rows, among which neurons are kept and counted."""
    key = "moe_pad_expert_input_to_capacity"
    if "routed" in config.mone.apply_to and config.megatron.transformer.get(key):
        yield (
            f"megatron.transformer.{key}: true gives experts rows of no token, which the neuron "
            "balance loss, rules and metrics would take for tokens; leave it out"
        )


def _packed_room(model: ModelConfig, mone: MoNEConfig) -> Iterator[str]:
    """Yields rules that may keep every neuron, for which packed memory has no room."""
    if mone.memory == "full":
        return
    rule, widths = RULES[mone.rule], neuron_widths(model)
    for target in mone.apply_to:
        key, width = widths[target]
        if width < 1 or not 0 < mone.keep_ratio <= 1:
            continue  # The groups themselves tell what is wrong with the sizes.
        try:
            budget = rule.budget(mone.keep_ratio, width, mone.rule_options)
        except ValueError:
            continue  # The group itself tells what is wrong with the options.
        if budget.kept < width and rule.most_kept(budget) >= width:
            yield (
                f"mone.memory: packed saves nothing with mone.rule={mone.rule}, which may keep all "
                f"{width} neurons of a row ({key}); use mone.memory=full"
            )


def _packed_layout(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yields layouts with which packed memory saves nothing."""
    if mone.memory == "full" or mone.balance.coeff == 0:
        return
    for target, key, size in _neuron_splits(mone, parallel):
        if size > 1:
            yield (
                f"mone.memory: packed saves nothing with a neuron balance loss where parallel.{key}"
                f"={size} splits the neurons ({target}); use mone.memory=full, or parallel.{key}=1"
            )


def _balance_layout(mone: MoNEConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yields layouts whose groups of ranks do not nest, as the neuron balance loss needs."""
    # An expert's tokens come from the ranks of one micro-batch or of several whole ones only when
    # the group that shares a micro-batch and the one that shares the experts nest.
    batch = parallel.tensor * parallel.context
    experts = parallel.expert * parallel.expert_tensor
    if mone.balance.coeff > 0 and not (is_multiple(experts, batch) or is_multiple(batch, experts)):
        yield (
            f"mone.balance.coeff: {mone.balance.coeff:g} needs parallel.tensor*context={batch} and "
            f"parallel.expert*expert_tensor={experts} to divide one another; use parallel.expert="
            f"{near_multiples(parallel.expert, batch // math.gcd(batch, parallel.expert_tensor))}"
            ", or mone.balance.coeff=0"
        )
