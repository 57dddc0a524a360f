"""Defines what a router is: the functions that send each token to some of the experts.

This file is copied into exported models. It imports no torch, so that names can be checked without.

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from mone_megatron.methods.bound import AtLeast
from mone_megatron.methods.options import NoOptions, Option, options_of, read_options

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

# Gives tokens times a transposed matrix, ``[..., O]`` of ``[..., I]`` and ``[O, I]``, in the
# precision of the routing computation.
Linear = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class RouterSettings:
    """Holds what a router may read: the sizes of its layer, and its own options.

    Attributes:
        experts: A, all experts of the layer.
        hidden: h, the values of a token.
        experts_per_token: k, ``model.experts_per_token``.
        options: an instance of the router's own options.
    """

    experts: int
    hidden: int
    experts_per_token: int
    options: Any = field(default_factory=NoOptions)

    @property
    def rank(self) -> int:
        """Returns the rank of a projection, of routers that have :class:`RankOptions`."""
        rank: int = self.options.rank
        return rank or max(1, self.hidden // 4)


@dataclass(frozen=True)
class RankOptions:
    """Holds the options of routers that score tokens by a projection."""

    rank: Annotated[int, AtLeast(0)] = 0
    """The rank of the projection; 0 takes a quarter of `model.hidden_size`."""


@dataclass(frozen=True)
class RouterWeight:
    """Describes one weight of a router, which every rank has whole.

    Attributes:
        shape: of it. A matrix is multiplied with values of as many as it has columns.
        initial: what all of it begins with; None for normal values of ``model.init_std``.
    """

    shape: tuple[int, ...]
    initial: float | None = None


@dataclass(frozen=True)
class RoutedWeights:
    """Holds what a router's loss is made of, for the tokens of a microbatch.

    Attributes:
        weights_NA: the assigned weights of this rank's tokens, 0 where an expert is not chosen;
            carry the gradient.
        tokens_A: int64, how many tokens go to each expert, over all ranks that share the
            microbatch.
        tokens: tokens of the microbatch, over the same ranks.
        experts_per_token: k, ``model.experts_per_token``.
        held: the router's own weights by name, which every rank has whole; carry the gradient.
    """

    weights_NA: Tensor
    tokens_A: Tensor
    tokens: int
    experts_per_token: int
    held: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Returns this rank's share of the tokens: its part of what reads no token."""
        return len(self.weights_NA) / self.tokens


def one_row_each(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns the usual weight: a row for each expert."""
    return {"weight": RouterWeight((settings.experts, settings.hidden))}


def products(
    tokens: Tensor, weights: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns the usual logits ``[..., A]``: a token's product with the row of each expert."""
    return linear(tokens, weights["weight"])


def projections(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns a projection for each expert: ``rank`` rows, one expert's behind another's."""
    return {"weight": RouterWeight((settings.experts * settings.rank, settings.hidden))}


def norms(
    tokens: Tensor, weights: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns the norm of each expert's projection of each token, ``[..., A]``."""
    from torch.linalg import vector_norm

    projected = linear(tokens, weights["weight"])
    norm: Tensor = vector_norm(projected.unflatten(-1, (settings.experts, -1)), dim=-1)
    return norm


def balanced_l1(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of sum over experts of A f P, an fp32 scalar.

    P is the mean weight of an expert, f its share of tokens as a part of k. It is Switch
    Transformer's loss of weights that need not sum to 1, so that it shrinks them, too.
    """
    weights_NA = routed.weights_NA.float()
    share_A = routed.tokens_A.float() / (routed.tokens * routed.experts_per_token)
    mean_A = weights_NA.sum(dim=0) / routed.tokens
    return weights_NA.shape[-1] * (share_A * mean_A).sum()


def hold_weight(router: Module, name: str, weight: Parameter) -> None:
    """Makes a weight a parameter of a router under its name; one with a dot gets a module."""
    from torch.nn import Module

    place, _, own = name.rpartition(".")
    if place and not hasattr(router, place):
        router.add_module(place, Module())
    router.get_submodule(place).register_parameter(own, weight)


def _none(settings: RouterSettings) -> int:
    return 0


@dataclass(frozen=True)
class Router:
    """Describes one router; ``model.router.kind`` names it.

    Training, planner and exports all read it here.

    Attributes:
        name: the router's name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        weights: its weights by name. The first is called ``weight``; a name with a dot is that of
            a weight in a module of its own.
        logits: the logits ``[..., A]`` of tokens ``[..., h]`` and these weights.
        assign: of logits ``[N, A]``, the weight of each expert for each token, in the logits'
            dtype, and 0 where the expert is not chosen; weights are never negative. None for what
            megatron-core makes of logits: the k largest, by score function, groups and bias.
        weigh: of the assigned weights ``[N, A]`` and these weights, what the outputs of experts are
            multiplied by, 0 where an expert is not chosen. It may be negative, and comes after the
            loss. None for the assigned weights.
        fixed_count: whether each token goes to exactly ``model.experts_per_token`` experts. A
            dispatcher that counts on it (flex) is refused otherwise.
        causal: whether a token's experts depend on no other token. No export can hold a router of
            which they do.
        reads_batch: whether a token's experts depend on the other tokens of its microbatch. A
            layout that splits them over ranks is refused then.
        options: a dataclass of ``model.router.options`` (:mod:`.methods.options`).
        latent: how many values of a token stand between it and its logits, which the backward pass
            keeps.
        loss: this rank's part of a loss on the assigned weights, or on its own, an fp32 scalar
            without the coefficient, which ``model.router.density`` steers. Such a router brings its
            own balance, and ``model.router.balance`` is refused. None for none.
        reference: ``module:Class`` of a subclass of megatron-core's ``TopKRouter`` for a router
            that is more than these functions; it is built with ``config`` and ``pg_collection``.
            No export holds such a router. None takes the class that computes the functions.
        stock: whether it says what megatron-core's own says, by a shorter way where there is one.
    """

    name: str
    formula: str
    source: str
    weights: Callable[[RouterSettings], Mapping[str, RouterWeight]] = one_row_each
    logits: Callable[[Tensor, Mapping[str, Tensor], Linear, RouterSettings], Tensor] = products
    assign: Callable[[Tensor, RouterSettings], Tensor] | None = None
    weigh: Callable[[Tensor, Mapping[str, Tensor], RouterSettings], Tensor] | None = None
    fixed_count: bool = True
    causal: bool = True
    reads_batch: bool = False
    options: type = NoOptions
    latent: Callable[[RouterSettings], int] = _none
    loss: Callable[[RoutedWeights], Tensor] | None = None
    reference: str | None = None
    stock: bool = False
    _options: Mapping[str, Option] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Finds out which options there are."""
        object.__setattr__(self, "_options", options_of(self.options))
        assigns = self.assign is not None
        assert assigns or self.weigh is None, f"router {self.name}: weighs what it assigns"

    @property
    def option_names(self) -> tuple[str, ...]:
        """Returns the names of its options."""
        return tuple(self._options)

    def read_options(self, options: Mapping[str, Any]) -> Any:
        """Returns an instance of the router's options.

        Args:
            options: values by name; those left out take their defaults.

        Raises:
            ValueError: a name is unknown, or a value is of another type or out of bounds, one line
                for each.
        """
        return read_options(
            self.options,
            self._options,
            options,
            key="model.router.options",
            owner=f"model.router.kind={self.name}",
        )

    @property
    def own_weights(self) -> bool:
        """Returns whether it weighs and chooses experts by itself.

        The score function, the groups, the scaling and the expert bias of megatron-core's router
        are not read then.
        """
        return self.assign is not None

    def parameters(self, settings: RouterSettings) -> int:
        """Returns the number of weights of one layer."""
        return sum(prod(weight.shape) for weight in self.weights(settings).values())

    def products(self, settings: RouterSettings) -> int:
        """Returns how many multiplications one token needs: the values of its matrices."""
        shapes = [weight.shape for weight in self.weights(settings).values()]
        return sum(prod(shape) for shape in shapes if len(shape) > 1)

    @cached_property
    def module(self) -> type:
        """Returns the class in training; importing megatron-core is left until it is asked for."""
        ours = "MethodRouter" if self.assign is None else "AssigningRouter"
        ours = ours if self.loss is None else "SteeredRouter"
        place, _, name = (self.reference or f"mone_megatron.mone.routers:{ours}").partition(":")
        found = getattr(import_module(place), name)
        assert isinstance(found, type), f"{place}:{name} is no class"
        return found
