"""Defines what a gate is: how routed experts make gate and up projections of a token.

This file is copied into exported models. It imports no torch, so that names can be checked without.

Shape suffixes: T tokens (rows), H hidden size, F neurons of one expert on this rank, Q columns of
what ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GateSize:
    """Says how large one expert is.

    Attributes:
        hidden: h, the values of a token.
        neurons: f, over all ranks that share the expert.
        rank: q, ``model.gate_rank``; gates that are not ``ranked`` do not read it.
    """

    hidden: int
    neurons: int
    rank: int


@dataclass(frozen=True)
class GateWeight:
    """Describes one weight of an expert.

    Attributes:
        shape: ``[..., rows, columns]`` of the whole expert; it is multiplied with rows of as many
            values as it has columns. Ranks that share the expert share its rows.
        std: the standard deviation of its initial values, as a multiple of ``model.init_std``; or
            that of a weight that does not follow ``model.init_std``, if ``absolute``.
        absolute: whether ``std`` is taken as it is.
    """

    shape: tuple[int, ...]
    std: float = 1.0
    absolute: bool = False

    @property
    def parameters(self) -> int:
        """Returns the number of values."""
        return prod(self.shape)


# Name -> the weight of all experts, ``[E, ...]``.
Weights = Mapping[str, "Tensor"]
# Gives rows times the transposed matrices of their experts, ``[T, O]`` of ``[T, I]`` and
# ``[E, ..., I]``, whose axes between are one together.
Product = Callable[["Tensor", "Tensor"], "Tensor"]


def _all_here(part_TQ: Tensor) -> Tensor:
    return part_TQ


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2, dim=-1)
    return first, second


@dataclass(frozen=True)
class Products:
    """Multiplies rows for a gate, which need not know on which device and in which layout.

    Attributes:
        product: rows times the matrices of their experts.
        whole: the columns ``[T, Q]`` of all ranks that share an expert, of this rank's.
        halves: both halves of the columns of a matrix.
    """

    product: Product
    whole: Callable[[Tensor], Tensor] = _all_here
    halves: Callable[[Tensor], tuple[Tensor, Tensor]] = _halves


def _none(size: GateSize) -> int:
    return 0


def _nothing_wrong(size: GateSize) -> str | None:
    return None


@dataclass(frozen=True)
class Gate:
    """Describes one gate; ``model.gate`` names it.

    Attributes:
        name: the gate's name in the configuration.
        formula: what it computes, for tables and figures.
        source: the paper or place that it comes from.
        weights: an expert's weights by name, in the order in which they are kept, but for the down
            projection.
        project: gate and up projections ``[T, F]`` of rows ``[T, H]``, linear in the rows.
        gate_parameters: how many weights of an expert every token uses to compute all its gate
            projections.
        gate_inputs: how many of these are a neuron's own.
        up_inputs: the weights of a neuron's up projection.
        latent: the values of a row that stand between it and its gate projections: the backward
            pass keeps them, and ranks that share an expert gather them.
        ranked: whether it reads ``model.gate_rank``.
        problem: what is wrong with a size, without the key; None if nothing is.
    """

    name: str
    formula: str
    source: str
    weights: Callable[[GateSize], Mapping[str, GateWeight]]
    project: Callable[[Tensor, Weights, Products], tuple[Tensor, Tensor]]
    gate_parameters: Callable[[GateSize], int]
    gate_inputs: Callable[[GateSize], int]
    up_inputs: Callable[[GateSize], int]
    latent: Callable[[GateSize], int] = _none
    ranked: bool = True
    problem: Callable[[GateSize], str | None] = _nothing_wrong
