"""Defines the group ``mone``: which neurons of an expert each token keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mone_megatron.config import density, options
from mone_megatron.config.convert import Scalar
from mone_megatron.config.density import NeuronDensityConfig
from mone_megatron.config.group import Group, all_but
from mone_megatron.config.marks import AtLeast, NameIn, OptionsOf, Within
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.losses import LOSSES
from mone_megatron.methods.rule import Rule
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES

MoNETarget = Literal["routed", "shared", "dense"]


def metrics_of(target: MoNETarget) -> str:
    """Returns how names of metrics of an MLP's neurons begin: ``mone``, or ``mone/shared``."""
    return "mone" if target == "routed" else f"mone/{target}"


@dataclass(frozen=True)
class NeuronBalanceConfig(Group):
    """Sets the loss that spreads tokens over neurons (:mod:`mone_megatron.mone.balance`)."""

    coeff: Annotated[float, AtLeast(0)] = 0.0
    """The weight of the loss; 0 turns it off, and its value is logged all the same."""
    kind: Annotated[str, NameIn(LOSSES)] = "switch"
    """Which loss it is: what counts as balance among neurons."""
    weights: Literal["selected", "all"] = "selected"
    """P_k is the mean weight of neuron k over the neurons a token keeps, or over all of them."""
    scope: Literal["microbatch", "group"] = "microbatch"
    """The tokens that an expert is balanced over: those of one microbatch, so that every layout has
    the same loss, or all that it sees at once, whatever microbatches they are of."""
    normalize: bool = True
    """Weights of a token divided by their sum (true), or raw |a| (false), which can be "balanced"
    by shrinking them."""


@dataclass(frozen=True)
class MoNEConfig(Group):
    """Says which neurons inside the experts a token keeps."""

    enabled: bool = False
    """Whether tokens keep only some neurons of an expert."""
    keep_ratio: Annotated[float, Within("(0, 1]", example=0.25)] = 0.25
    """The target density of every rule; `topk` keeps K = round(keep_ratio * f) neurons for each
    token in each expert."""
    score: Annotated[str, NameIn(SCORES)] = "abs_activation"
    """What ranks the neurons of a token."""
    rule: Annotated[str, NameIn(RULES)] = "topk"
    """Which of the ranked neurons are kept."""
    rule_options: Annotated[Mapping[str, Scalar], OptionsOf(RULES)] = field(
        default_factory=dict, hash=False
    )
    """The rule's own options by name; those of another rule are refused."""
    apply_to: tuple[MoNETarget, ...] = ("routed",)
    """Which MLPs select: routed experts, the shared expert, dense layers."""
    memory: Literal["full", "packed"] = "full"
    """What the experts save for the backward pass: the values of every neuron, or of the kept ones
    only (docs/performance.md#memory-mode)."""
    straight_through: bool = False
    """Whether neurons that are left out get gradients as if they were kept
    (docs/method.md#gradients)."""
    density: NeuronDensityConfig = field(default_factory=NeuronDensityConfig)
    balance: NeuronBalanceConfig = field(default_factory=NeuronBalanceConfig)
    keep_ratio_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The keep ratio over the first steps, so that an MoE with dense experts anneals into MoNE:
    `constant` is `keep_ratio` from the first step, the others go down to it."""
    keep_ratio_start: float = 1.0
    """The ratio of the first step; 1 keeps all neurons."""
    keep_ratio_steps: int = 0
    """The number of steps after which the ratio is `keep_ratio`."""

    def unread(self) -> Mapping[str, str]:
        """Returns what neither selects neurons nor says how."""
        if not self.enabled:
            return all_but(self, ["enabled"], "mone.enabled=false")
        if self.keep_ratio == 1:
            kept = ("keep_ratio", "enabled", "density", "apply_to")
            return all_but(self, kept, "mone.keep_ratio=1, which keeps all neurons")
        unread = {}
        if self.keep_ratio_schedule == "constant":
            unread["keep_ratio_start"] = "mone.keep_ratio_schedule=constant"
        if RULES[self.rule].keeps_nonzero:
            why = f"mone.rule={self.rule}, whose other neurons are 0 and have no gradients"
            unread["straight_through"] = why
        return unread

    def keep_ratio_at(self, step: int) -> float:
        """Returns the keep ratio that a step (from 1) trains with, as its checkpoint is used."""
        if self.keep_ratio_schedule == "constant" or step > self.keep_ratio_steps:
            return self.keep_ratio
        progress = max(step - 1, 0) / self.keep_ratio_steps
        if self.keep_ratio_schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.keep_ratio_start + (self.keep_ratio - self.keep_ratio_start) * progress

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        if not self.enabled:
            return
        if not self.apply_to:
            yield "mone.apply_to: empty with mone.enabled=true; use [routed], or mone.enabled=false"
        for target, count in Counter(self.apply_to).items():
            if count > 1:
                yield f"mone.apply_to: {target} is listed {count} times; list it once"
        yield from self._rule_options()
        yield from self._schedule()
        yield from self._balance()
        yield from density.problems(self.density, "mone.density")
        if self.memory == "packed" and self.straight_through:
            yield (
                "mone.memory: packed forgets the neurons that are not kept, and "
                "mone.straight_through=true gives them gradients; use mone.memory=full"
            )
        if self.memory == "packed" and self.balance.coeff != 0 and self.balance.weights == "all":
            yield (
                "mone.memory: packed forgets the neurons that are not kept, and the balance loss "
                "weighs them with mone.balance.weights=all; use weights=selected, or "
                "mone.memory=full"
            )

    def _balance(self) -> Iterator[str]:
        """Yields weights that the loss is not written for."""
        loss, balance = LOSSES[self.balance.kind], self.balance
        if loss.normalized is not None and balance.normalize != loss.normalized:
            wanted = "normalised" if loss.normalized else "raw"
            yield (
                f"mone.balance.normalize: {str(balance.normalize).lower()} with mone.balance.kind="
                f"{loss.name}, which is of {wanted} weights; use {str(loss.normalized).lower()}"
            )
        if loss.signed and self.memory == "packed":
            yield (
                f"mone.memory: packed saves nothing with mone.balance.kind={loss.name}, which "
                "needs all gate projections again; use mone.memory=full"
            )

    def _rule_options(self) -> Iterator[str]:
        """Yields the options that the rule does not have, or that are of another type."""
        rule = RULES[self.rule]
        if rule.shifts(self.rule_options) and self.score != rule.score:
            yield (
                f"mone.score: {self.score} with mone.rule_options.{rule.shift_option}=true of "
                f"mone.rule={self.rule}, which keeps what is above 0; use {rule.score}"
            )
        yield from options.problems(
            rule.options,
            self.rule_options,
            key="mone.rule_options",
            owner=f"mone.rule={self.rule}",
        )
        yield from self._unmoved(rule)

    def _unmoved(self, rule: Rule) -> Iterator[str]:
        """Yields options for moving what the rule does not move itself."""
        steered = DENSITY_STEPS[self.density.step].factor is not None
        for name, steerable in rule.steerable.items():
            fixed = steerable.unless
            if steered and self.density.steers == name:
                why = f"mone.density, which steers {name}"
            elif fixed is not None and self.rule_options.get(fixed):
                why = f"mone.rule_options.{fixed}={self.rule_options[fixed]}, which stays"
            else:
                continue
            for option in steerable.moved_by:
                value = self.rule_options.get(option)
                if value is not None and value != getattr(rule.options(), option):
                    yield (
                        f"mone.rule_options.{option}: {value} has no effect with {why}; "
                        "leave it out"
                    )

    def _schedule(self) -> Iterator[str]:
        if self.keep_ratio_schedule == "constant":
            if self.keep_ratio_steps:
                yield (
                    f"mone.keep_ratio_steps: {self.keep_ratio_steps} needs "
                    "mone.keep_ratio_schedule=linear or cosine"
                )
        elif not self.keep_ratio <= self.keep_ratio_start <= 1:
            yield (
                f"mone.keep_ratio_start: {self.keep_ratio_start:g} is not between mone.keep_ratio="
                f"{self.keep_ratio:g} and 1; a schedule goes down"
            )
