"""Defines what a router is: the module that sends each token to some of the experts.

It imports no torch, so that names can be checked without.

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mone_megatron.methods.registry import imported

if TYPE_CHECKING:
    from torch import Tensor


def projection_rank(rank: int, hidden_size: int) -> int:
    """Returns the rank of an expert's projection: ``model.router.rank``, or a quarter of h."""
    return rank or max(1, hidden_size // 4)


@dataclass(frozen=True)
class RoutedWeights:
    """Holds what a router's loss is made of, for the tokens of a microbatch.

    Attributes:
        weights_NA: the weights of this rank's tokens, 0 where an expert is not chosen; carry the
            gradient.
        tokens_A: int64, how many tokens go to each expert, over all ranks that share the
            microbatch.
        tokens: tokens of the microbatch, over the same ranks.
        experts_per_token: k, ``model.experts_per_token``.
    """

    weights_NA: Tensor
    tokens_A: Tensor
    tokens: int
    experts_per_token: int


@dataclass(frozen=True)
class Router:
    """Describes one router; ``model.router.kind`` names it.

    Attributes:
        name: the router's name in the configuration.
        formula: what it computes, for tables.
        source: the paper or place that it comes from.
        reference: ``module:Class`` of a subclass of megatron-core's ``TopKRouter``, which is built
            with ``config`` and ``pg_collection`` and returns probabilities and a routing map, each
            ``[tokens, experts]``. Its weight keeps the name of megatron-core's, and has a row of
            the hidden size for each expert, or several (``low_rank``).
        fixed_count: whether each token goes to exactly ``model.experts_per_token`` experts. A
            dispatcher that counts on it (flex) is refused otherwise.
        causal: whether a token's experts depend on no other token.
        reads_batch: whether a token's experts depend on the other tokens of its microbatch. A
            layout that splits them over ranks is refused then.
        settings: the keys of ``model.router`` that its class reads, as attributes of these names.
        own_weights: whether it weighs and chooses experts by itself, so that the score function,
            the groups, the scaling and the expert bias of megatron-core's router are not read.
        low_rank: whether the weight has :func:`projection_rank` rows for each expert.
        scalars: how many numbers an expert has beside.
        loss: this rank's part of a loss on the weights, an fp32 scalar without the coefficient,
            which ``model.router.density`` steers. Such a router brings its own balance, and
            ``model.router.balance`` is refused. None for none.
        stock: whether it is megatron-core's own, which exports can hold.
    """

    name: str
    formula: str
    source: str
    reference: str
    fixed_count: bool = True
    causal: bool = True
    reads_batch: bool = False
    settings: tuple[str, ...] = ()
    own_weights: bool = False
    low_rank: bool = False
    scalars: int = 0
    loss: Callable[[RoutedWeights], Tensor] | None = None
    stock: bool = False

    def weights(self, experts: int, hidden_size: int, rank: int) -> int:
        """Returns how many weights the matrix of one layer has.

        Args:
            experts: of the layer.
            hidden_size: h.
            rank: ``model.router.rank``.
        """
        rows = projection_rank(rank, hidden_size) if self.low_rank else 1
        return experts * rows * hidden_size

    @cached_property
    def module(self) -> type:
        """Returns the class itself; importing megatron-core is left until it is asked for."""
        found = imported(self.reference)
        assert isinstance(found, type), f"{self.reference} is no class"
        return found
