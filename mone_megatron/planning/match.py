"""Pairs a MoE and a MoNE model that are equal in one count, changing one dimension of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.layout import smallest_world_size
from mone_megatron.config.schema import Config, ModelConfig
from mone_megatron.config.validate import validate
from mone_megatron.planning.budget import Usage, budget_of
from mone_megatron.planning.parameters import count_parameters
from mone_megatron.planning.plan import vocabulary_of

Count = Literal["activated", "flops", "total"]
Dimension = Literal["expert_ffn_hidden_size", "experts_per_token", "num_experts"]
Side = Literal["moe", "mone"]

COUNTS: tuple[Count, ...] = ("activated", "flops", "total")
DIMENSIONS: tuple[Dimension, ...] = (
    "expert_ffn_hidden_size",
    "experts_per_token",
    "num_experts",
)
SIDES: tuple[Side, ...] = ("moe", "mone")
TOLERANCE = 0.001
_AS_SET = Usage()
# The dimension is tried up to so many times what it is.
_LARGEST_FACTOR = 8


@dataclass(frozen=True)
class Pair:
    """Holds two configurations that are equal in ``count``, or as near as was accepted."""

    count: Count
    moe: Config
    mone: Config
    # What was changed, and on which side; None when the two were equal as they were.
    changed: str | None
    moe_value: int
    mone_value: int

    @property
    def difference(self) -> float:
        """Returns the difference of the two values, relative to the MoE's."""
        return abs(self.mone_value - self.moe_value) / self.moe_value


def value_of(config: Config, count: Count, usage: Usage = _AS_SET) -> int:
    """Returns the count that is to be equal: activated (gate counted) or total parameters, or ideal
    FLOPs per step.

    Args:
        config: of the model.
        count: which of them.
        usage: what tokens use where the method does not fix it; they use their target without.
    """
    vocab_size = vocabulary_of(config)
    if count == "total":
        return count_parameters(config.model, config.mone, vocab_size).total
    budget = budget_of(config, vocab_size, usage)
    return round(budget.step_flops if count == "flops" else budget.activated)


def match(
    config: Config,
    count: Count,
    *,
    dimension: Dimension,
    side: Side,
    tolerance: float = TOLERANCE,
    usage: Usage = _AS_SET,
) -> Pair:
    """Pairs ``config``, whose ``mone.*`` says how neurons are selected, with its MoE baseline.

    Args:
        config: ``mone.enabled`` or not; the pair has one of each.
        count: what is to be equal.
        dimension: the one model key that may change.
        side: which of the two it changes on; the other stays as it is.
        tolerance: the largest relative difference that is accepted when no value is exact.
        usage: what the tokens of a trained run of the MoNE side use.

    Raises:
        ConfigError: when no value comes near enough, with the nearest; or nothing can be matched.
    """
    if config.model.num_experts == 0:
        raise ConfigError("--match: model.num_experts=0 has no experts to select neurons in")
    moe = replace(config, mone=replace(config.mone, enabled=False))
    mone = replace(config, mone=replace(config.mone, enabled=True))
    pair = _pair(count, moe, mone, usage, changed=None)
    if pair.difference == 0:
        return pair
    best: Pair | None = None
    changing = moe if side == "moe" else mone
    for value, changed in _candidates(changing, dimension):
        key = f"model.{dimension}={value} ({side})"
        both = (changed, mone) if side == "moe" else (moe, changed)
        found = _pair(count, *both, usage, changed=key)
        if best is None or found.difference < best.difference:
            best = found
    if best is None:
        raise ConfigError(f"--dimension: no value of model.{dimension} is valid; use another")
    if best.difference > tolerance:
        raise ConfigError(
            f"--match {count}: no model.{dimension} of the {side} side comes within "
            f"{tolerance:.2%}; the nearest is {best.changed}, {best.difference:.2%} off "
            f"({best.moe_value:,} MoE, {best.mone_value:,} MoNE); use another --dimension, "
            "--side or mone.keep_ratio"
        )
    return best


def _pair(count: Count, moe: Config, mone: Config, usage: Usage, *, changed: str | None) -> Pair:
    # The number of experts is the router's, which both have; that of neurons is MoNE's alone.
    values = value_of(moe, count, replace(usage, density={})), value_of(mone, count, usage)
    return Pair(count, moe, mone, changed, *values)


def _sizes(model: ModelConfig) -> dict[Dimension, int]:
    return {
        "expert_ffn_hidden_size": model.expert_ffn_hidden_size,
        "experts_per_token": model.experts_per_token,
        "num_experts": model.num_experts,
    }


def _candidates(config: Config, dimension: Dimension) -> Iterator[tuple[int, Config]]:
    """Yields each value of the dimension whose config is valid on the smallest layout, with that
    config.
    """
    gpus = smallest_world_size(config.parallel)
    for value in range(1, _LARGEST_FACTOR * _sizes(config.model)[dimension] + 1):
        sizes = _sizes(config.model) | {dimension: value}
        model = replace(
            config.model,
            expert_ffn_hidden_size=sizes["expert_ffn_hidden_size"],
            experts_per_token=sizes["experts_per_token"],
            num_experts=sizes["num_experts"],
        )
        changed = replace(config, model=model)
        try:
            # As on a GPU machine, where experts are aligned for bf16.
            validate(changed, world_size=gpus, num_devices=gpus, local_world_size=gpus)
        except ConfigError:
            continue
        yield value, changed
