"""Defines the section ``model.router``: expert routing and balancing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mone_megatron.config import density as density_config
from mone_megatron.config import options
from mone_megatron.config.convert import Scalar
from mone_megatron.config.density import RouterDensityConfig
from mone_megatron.config.group import Group
from mone_megatron.config.marks import Above, AtLeast, NameIn, OptionsOf, Within
from mone_megatron.config.wording import listed, near_divisors
from mone_megatron.methods.routers import ROUTERS

# The options that have a key beside `options`.
_ALIASES = ("top_p", "rank", "threshold")

RouterBalance = Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"]


@dataclass(frozen=True)
class RouterConfig(Group):
    """Sets how tokens are routed to experts and spread over them, by megatron-core's own router."""

    kind: Annotated[str, NameIn(ROUTERS)] = "topk"
    """The router; `topk` is megatron-core's own."""
    options: Annotated[Mapping[str, Scalar], OptionsOf(ROUTERS)] = field(
        default_factory=dict, hash=False
    )
    """The router's own options by name; those of another router are refused."""
    top_p: Annotated[float, Within("(0, 1]", example=0.4)] = 0.4
    """Another name of `options.top_p`."""
    rank: Annotated[int, AtLeast(0)] = 0
    """Another name of `options.rank`."""
    threshold: Annotated[float, Above(0)] = 0.05
    """Another name of `options.threshold`."""
    density: RouterDensityConfig = field(default_factory=RouterDensityConfig)
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """The function that turns logits into expert weights."""
    pre_softmax: bool = False
    """Softmax over all experts before the top-k (true) or over the chosen ones after it (false)."""
    balance: tuple[RouterBalance, ...] = ("aux_loss",)
    """Balance losses, several at once if wanted; each with the coefficient at the same place."""
    balance_coeff: tuple[float, ...] = (0.01,)
    """One coefficient for each entry of `balance`."""
    z_loss_coeff: Annotated[float, AtLeast(0)] = 0.0
    """The coefficient of the ST-MoE z-loss; 0 turns it off."""
    expert_bias: bool = False
    """Aux-loss-free balancing (DeepSeek-V3): a bias per expert, moved by `expert_bias_rate` a
    step."""
    expert_bias_rate: float = 1e-3
    """How far a step moves the expert bias."""
    dtype: Literal["fp32", "fp64", "model"] = "fp32"
    """The precision of the routing computation."""
    num_groups: Annotated[int, AtLeast(0)] = 0
    """The groups of group-limited routing; 0 turns it off."""
    group_topk: Annotated[int, AtLeast(0)] = 0
    """Groups that a token may visit: those with the largest sum of their best experts_per_token /
    group_topk experts, as in DeepSeek-V3. DeepSeek-V2's `group_limited_greedy`, which ranks a group
    by its best expert, is that only with `group_topk` equal to `experts_per_token`; otherwise it is
    not supported. (DeepSeek-V2-Lite has no groups.)"""
    scaling_factor: Annotated[float, AtLeast(0)] = 0.0
    """Multiplies the routing weights (sigmoid or pre-softmax routers); 0 means 1."""

    def unread(self) -> Mapping[str, str]:
        """Returns what is of ways of routing or balancing that are not used."""
        unread = {} if self.expert_bias else {"expert_bias_rate": "model.router.expert_bias=false"}
        if ROUTERS[self.kind].own_weights:
            return unread  # What it does not read is refused.
        if "sinkhorn" in self.balance:
            why = "model.router.balance=[sinkhorn]"
            unread |= dict.fromkeys(("pre_softmax", "scaling_factor"), why)
        elif self.score_function != "softmax":
            unread["pre_softmax"] = f"model.router.score_function={self.score_function}"
        return unread

    @property
    def chosen_options(self) -> dict[str, Scalar]:
        """Returns the options that are given by name, under either of their keys."""
        known = ROUTERS[self.kind].option_names
        return {name: value for name, value in self._aliased() if name in known} | {**self.options}

    def _aliased(self) -> Iterator[tuple[str, Scalar]]:
        """Yields the options that are given by their other keys, which older files have."""
        for name in _ALIASES:
            value: Scalar = getattr(self, name)
            if value != getattr(RouterConfig, name):
                yield name, value

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this section alone."""
        kinds, coeffs = self.balance, self.balance_coeff
        if len(kinds) != len(coeffs):
            yield (
                f"model.router.balance_coeff: {len(coeffs)} coefficients for {len(kinds)} losses "
                "in model.router.balance; give one for each"
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
                    f"model.router.balance_coeff: {listed(coeffs)} with model.router.balance="
                    f"[{alone}], which adds no loss; use [0.0]"
                )
        if any(coeff < 0 for coeff in coeffs):
            yield (
                f"model.router.balance_coeff: {listed(coeffs)} has a negative entry; use 0 or more"
            )

    def rules_with_experts(self, num_experts: int, experts_per_token: int) -> Iterator[str]:
        """Yields what is wrong with this router in a model that has experts."""
        yield from self._options()
        yield from self._own_weights()
        yield from self._density()
        sigmoid = self.score_function == "sigmoid"
        if self.expert_bias and not sigmoid:
            yield (
                "model.router.expert_bias: needs model.router.score_function=sigmoid, which is "
                f"{self.score_function}; set sigmoid, or model.router.expert_bias=false"
            )
        if self.expert_bias and self.expert_bias_rate <= 0:
            yield (
                f"model.router.expert_bias_rate: {self.expert_bias_rate:g} never moves the bias; "
                "use a number above 0 such as 0.001"
            )
        if "sinkhorn" in self.balance and sigmoid:
            yield (
                "model.router.score_function: sinkhorn has its own score; "
                "use softmax with model.router.balance=[sinkhorn]"
            )
        # A softmax over the single chosen logit is the constant 1, so the router gets no gradient.
        own = ROUTERS[self.kind].own_weights
        over_one = not own and experts_per_token == 1 and not sigmoid and not self.pre_softmax
        if over_one and "sinkhorn" not in self.balance:
            yield (
                "model.router.pre_softmax: false with model.experts_per_token=1 gives the router "
                "no gradient; use model.router.pre_softmax=true"
            )
        if self.scaling_factor and not (sigmoid or self.pre_softmax):
            yield (
                f"model.router.scaling_factor: {self.scaling_factor:g} needs a sigmoid or "
                "pre-softmax router; use 0, or model.router.pre_softmax=true"
            )
        if self.num_groups or self.group_topk:
            yield from self._groups(num_experts, experts_per_token)

    def _options(self) -> Iterator[str]:
        """Yields the options that the router does not have, or that are wrong."""
        router = ROUTERS[self.kind]
        known = ", ".join(router.option_names) or "none"
        for name, value in self._aliased():
            if name not in router.option_names:
                yield (
                    f"model.router.{name}: {value} has no effect with model.router.kind="
                    f"{self.kind}, whose options are {known}; leave it out"
                )
            elif name in self.options and self.options[name] != value:
                yield (
                    f"model.router.{name}: {value} beside model.router.options.{name}="
                    f"{self.options[name]}, which is the same option; leave one out"
                )
        yield from options.problems(
            router.options,
            self.options,
            key="model.router.options",
            owner=f"model.router.kind={self.kind}",
        )

    def _own_weights(self) -> Iterator[str]:
        """Yields what a router that weighs experts by itself does not read."""
        router = ROUTERS[self.kind]
        if router.own_weights:
            unread = {
                "score_function": (self.score_function != "softmax", "softmax"),
                "pre_softmax": (self.pre_softmax, "false"),
                "expert_bias": (self.expert_bias, "false"),
                "num_groups": (self.num_groups > 0, "0"),
                "group_topk": (self.group_topk > 0, "0"),
                "scaling_factor": (self.scaling_factor != 0, "0"),
            }
            for key, (given, usual) in unread.items():
                if given:
                    yield (
                        f"model.router.{key}: has no effect with model.router.kind={self.kind}, "
                        f"which weighs experts by itself; use {usual}"
                    )
        if router.own_weights and "sinkhorn" in self.balance:
            yield (
                f"model.router.balance: sinkhorn routes, and model.router.kind={self.kind} does so "
                "by itself; use another loss"
            )
        if router.loss is not None and any(kind != "none" for kind in self.balance):
            yield (
                f"model.router.balance: [{', '.join(self.balance)}] beside the loss of "
                f"model.router.kind={self.kind}: it evens out the softmax of logits, by which this "
                "router does not weigh experts; set model.router.balance=[none] and "
                "model.router.balance_coeff=[0.0] (model.router.density steers the router's loss)"
            )

    def _density(self) -> Iterator[str]:
        """Yields settings of a controller that steers nothing, or nowhere."""
        key = "model.router.density"
        if ROUTERS[self.kind].loss is None:
            why = f"model.router.kind={self.kind}, which has no loss to steer"
            yield from density_config.without_effect(self.density, key, why)
            return
        yield from density_config.problems(self.density, key)
        yield from density_config.coefficient_problems(self.density, key)

    def _groups(self, num_experts: int, experts_per_token: int) -> Iterator[str]:
        """Yields what is wrong with group-limited routing.

        It splits the experts into groups, and a token visits a few of them.
        """
        groups, chosen = self.num_groups, self.group_topk
        if groups < 1 or chosen < 1:
            yield (
                f"model.router.group_topk: {chosen} with model.router.num_groups={groups}; "
                "set both above 0, or both to 0"
            )
            return
        if "sinkhorn" in self.balance:
            yield f"model.router.num_groups: {groups} is ignored by sinkhorn routing; use 0"
        if num_experts % groups:
            yield (
                f"model.router.num_groups: {groups} does not divide model.num_experts="
                f"{num_experts}; use {near_divisors(num_experts, groups)}"
            )
        elif chosen > groups:
            yield (
                f"model.router.group_topk: {chosen} is more than model.router.num_groups={groups}; "
                f"use {groups} or fewer"
            )
        elif experts_per_token < chosen or experts_per_token % chosen:
            # Megatron ranks a group by its best experts_per_token // group_topk experts.
            yield (
                f"model.router.group_topk: {chosen} does not divide model.experts_per_token="
                f"{experts_per_token}; use {near_divisors(experts_per_token, chosen)}"
            )
        elif experts_per_token // chosen > num_experts // groups:
            yield (
                f"model.router.group_topk: {chosen} groups of {num_experts // groups} experts "
                f"cannot give model.experts_per_token={experts_per_token}; use "
                f"{math.ceil(experts_per_token / (num_experts // groups))} or more"
            )
