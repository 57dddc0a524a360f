"""Defines the sections ``mone.density`` and ``model.router.density``: steered densities."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group, given
from mone_megatron.config.marks import Above, AtLeast, NameIn, Within
from mone_megatron.methods.density_steps import DENSITY_STEPS


@dataclass(frozen=True)
class DensityConfig(Group):
    """The controller of a density (:mod:`mone_megatron.mone.density`)."""

    step: Annotated[str, NameIn(DENSITY_STEPS)] = "off"
    """How a step moves the quantity that decides the density; `off` moves nothing."""
    target: Annotated[float, Within("[0, 1]")] = 0.0
    """The density to steer to. 0 takes the one that planned counts use: `mone.keep_ratio` with its
    schedule, or `model.experts_per_token` of `model.num_experts`."""
    rate: Annotated[float, Above(0)] = 0.2
    """How far a step moves it: `alpha` is 1 + rate, `squared` multiplies the square by it."""
    start: Annotated[float, AtLeast(0)] = 0.0
    """Its first value; 0 takes 1e-8 for a loss's coefficient, and what the rule says for others."""
    cap: Annotated[float, Above(0)] = 1.0
    """The largest coefficient of a loss; the rule says the largest of others."""

    @property
    def counts_when_off(self) -> tuple[str, ...]:
        """Returns the fields that have an effect also while ``step`` moves nothing."""
        return ()


@dataclass(frozen=True)
class NeuronDensityConfig(DensityConfig):
    """The controller of the share of neurons that are kept."""

    steers: str = "sparsity_coeff"
    """The quantity: `sparsity_coeff`, of `model.sparsity_loss` with rules that come to no density
    by themselves (`nonzero`), or one that the rule has for each expert and which is then the same
    for all: `p` of `mass`, `tau` of `threshold`."""


@dataclass(frozen=True)
class RouterDensityConfig(DensityConfig):
    """The controller of the share of experts that a token goes to."""

    step: Annotated[str, NameIn(DENSITY_STEPS)] = "alpha"
    """How a step moves the coefficient of the router's own loss, in kinds that have
    one, such as `relu`; `off` leaves it at `start`."""

    @property
    def counts_when_off(self) -> tuple[str, ...]:
        """Returns the coefficient that the router's loss keeps."""
        return ("start",)


def steered_start(density: DensityConfig, own: float) -> float:
    """Returns the first value of the quantity.

    Args:
        density: the section.
        own: what the quantity starts with by itself.
    """
    return density.start or own


def problems(density: DensityConfig, key: str) -> Iterator[str]:
    """Yields settings of a controller that is off, but for those that count all the same."""
    if DENSITY_STEPS[density.step].factor is None:
        why = f"{key}.step={density.step}"
        yield from without_effect(density, key, why, but=("step", *density.counts_when_off))


def coefficient_problems(density: DensityConfig, key: str) -> Iterator[str]:
    """Yields a first coefficient of a loss that is larger than the largest one."""
    if density.start > density.cap:
        yield (
            f"{key}.start: {density.start:g} is more than {key}.cap={density.cap:g}, the largest "
            f"coefficient; use {density.cap:g} or less, or a larger cap"
        )


def without_effect(
    density: DensityConfig, key: str, why: str, but: Collection[str] = ()
) -> Iterator[str]:
    """Yields the settings of a controller that have no effect.

    Args:
        density: the section.
        key: of the section.
        why: the setting that makes it so.
        but: the fields that have an effect.
    """
    for name, value in given(density):
        if name not in but:
            yield f"{key}.{name}: {value} has no effect with {why}; leave it out"
