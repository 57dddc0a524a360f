"""Defines what a score is: the function that ranks the neurons of a token. Larger is kept first.

This file is copied into exported models. It imports no torch, so that names can be checked without.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["gate", "activation", "up", "product", "down_norm"]


class Neurons:
    """Holds the neurons of some rows, as far as a score says that it reads them.

    A part that was not given is an error where it is read: a score that reads more than it declares
    would rank by something that a kernel, a rank or an export does not have.
    """

    def __init__(
        self,
        *,
        gate_TF: Tensor,
        up_TF: Tensor | None = None,
        activate: Callable[[Tensor], Tensor] | None = None,
        product_TF: Tensor | None = None,
        down_norm_TF: Tensor | None = None,
    ) -> None:
        """Holds the parts.

        Args:
            gate_TF: the gate projections g, ``[T, F]``.
            up_TF: the up projections u, ``[T, F]``.
            activate: the function that gives the activation a of the gate projection g.
            product_TF: a * u, where the experts compute it in a way of their own; else it is
                computed of the other parts.
            down_norm_TF: the Euclidean norm of each neuron's row of the down projection, a shape
                that broadcasts to ``[T, F]``.
        """
        self._gate_TF = gate_TF
        self._up_TF = up_TF
        self._activate = activate
        self._product_TF = product_TF
        self._down_norm_TF = down_norm_TF

    @property
    def gate(self) -> Tensor:
        """Returns the gate projections g, ``[T, F]``."""
        return self._gate_TF

    @property
    def activation(self) -> Tensor:
        """Returns the weights a of the neurons, ``[T, F]``; a = SiLU(g) in the paper."""
        assert self._activate is not None, "the score reads `activation` without declaring it"
        return self._activate(self._gate_TF)

    @property
    def up(self) -> Tensor:
        """Returns the up projections u, ``[T, F]``."""
        assert self._up_TF is not None, "the score reads `up` without declaring it"
        return self._up_TF

    @property
    def product(self) -> Tensor:
        """Returns a * u, what a neuron sends to its row of the down projection, ``[T, F]``."""
        if self._product_TF is not None:
            return self._product_TF
        assert self._activate is not None, "the score reads `product` without declaring it"
        assert self._up_TF is not None, "the score reads `product` without declaring it"
        return self._activate(self._gate_TF) * self._up_TF

    @property
    def down_norm(self) -> Tensor:
        """Returns the norm of each neuron's down-projection row; broadcasts to ``[T, F]``."""
        assert self._down_norm_TF is not None, "the score reads `down_norm` without declaring it"
        return self._down_norm_TF


@dataclass(frozen=True)
class Score:
    """Describes one score; ``mone.score`` names it.

    Attributes:
        name: the score's name in the configuration.
        formula: what it computes, for tables and figures.
        source: the paper or place that it comes from.
        function: the scores of some neurons, of the shape and dtype of the gate. Row by row and
            neuron by neuron: a neuron's score reads nothing of other neurons.
        reads: the parts of ``Neurons`` that the function reads.
        signed: whether a score can be negative.
        fused: ``module:attribute`` of its form in Triton: a device function of (gate, up, weight,
            NARROW), the first three fp32, that returns the score before its last rounding (and
            before its absolute value, if it is not signed). Beside the activation it may use
            exactly rounded operations only, so that its bits are torch's. None lets torch compute
            the scores, which is correct and slower.
    """

    name: str
    formula: str
    source: str
    function: Callable[[Neurons], Tensor]
    reads: frozenset[Part] = field(default_factory=lambda: frozenset({"activation"}))
    signed: bool = False
    fused: str | None = None

    @property
    def reads_up(self) -> bool:
        """Returns whether all up projections have to be known before any neuron is chosen."""
        return not self.reads.isdisjoint({"up", "product"})

    @property
    def reads_activation(self) -> bool:
        """Returns whether the activation is computed for it."""
        return not self.reads.isdisjoint({"activation", "product"})

    def of(
        self,
        *,
        gate_TF: Tensor,
        up_TF: Tensor | None,
        activate: Callable[[Tensor], Tensor] | None,
        product_TF: Tensor | None = None,
        down_norm_TF: Tensor | None = None,
    ) -> Tensor:
        """Returns the scores ``[T, F]``, giving the function only what it declares to read."""
        scores_TF = self.function(
            Neurons(
                gate_TF=gate_TF,
                up_TF=up_TF if self.reads_up else None,
                activate=activate if self.reads_activation else None,
                product_TF=product_TF if "product" in self.reads else None,
                down_norm_TF=down_norm_TF if "down_norm" in self.reads else None,
            )
        )
        assert scores_TF.shape == gate_TF.shape, f"score {self.name} gives another shape"
        # Kernels rank in one of these two.
        assert scores_TF.dtype == gate_TF.dtype or scores_TF.dtype.itemsize == 4, (
            f"score {self.name} gives {scores_TF.dtype}; use the dtype of the gate, or fp32"
        )
        return scores_TF
