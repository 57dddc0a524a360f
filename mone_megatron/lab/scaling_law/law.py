"""Defines the law: loss as a function of parameters, tokens and kept neurons.

    L(N, D)    = E + A / N^alpha + B / D^beta                  Chinchilla, arXiv 2203.15556
    L(N, D, r) = E + A / (N r^gamma)^alpha + B / D^beta        with the activated-neuron term

r is the share of the neurons that a token keeps and N counts all of them, so N r^gamma is the size
of the dense-neuron model of equal loss: gamma 0 says that selection costs nothing, 1 that a model
is worth the neurons it keeps. At r = 1 the law is the first one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mone_megatron.report.stats import FloatArray


@dataclass(frozen=True)
class Allocation:
    """Holds the parameters and tokens of least loss for a budget of operations."""

    flops: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """Holds coefficients of the law; `gamma` is None without the activated-neuron term."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    gamma: float | None = None

    @property
    def coefficients(self) -> dict[str, float]:
        """Returns the coefficients by name; `gamma` only with the activated-neuron term."""
        named = {"E": self.E, "A": self.A, "alpha": self.alpha, "B": self.B, "beta": self.beta}
        return named if self.gamma is None else {**named, "gamma": self.gamma}

    @property
    def finite(self) -> bool:
        """Returns whether every coefficient is a number."""
        return all(math.isfinite(value) for value in self.coefficients.values())

    def loss(
        self, params: FloatArray, tokens: FloatArray, ratio: FloatArray | None = None
    ) -> FloatArray:
        """Returns the predicted loss in nats per token, elementwise.

        Args:
            params: N.
            tokens: D.
            ratio: r; None is 1. Without the activated-neuron term it has no effect.
        """
        size = np.asarray(params, np.float64)
        if self.gamma is not None and ratio is not None:
            size = size * np.asarray(ratio, np.float64) ** self.gamma
        return np.asarray(
            self.E + self.A * size**-self.alpha + self.B * np.asarray(tokens) ** -self.beta
        )

    @property
    def has_optimum(self) -> bool:
        """Returns whether more parameters and more tokens both help, so a budget has a best use."""
        return self.finite and self.alpha > 0 and self.beta > 0

    @property
    def params_exponent(self) -> float:
        """Returns a of N_opt ~ C^a where C is proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> float:
        """Returns b of D_opt ~ C^b where C is proportional to N D."""
        return self.alpha / (self.alpha + self.beta)

    def optimum(self, flops: float, flops_per_param_token: float, ratio: float = 1.0) -> Allocation:
        """Returns the N and D of least loss with ``flops_per_param_token * N * D = flops``.

        Args:
            flops: the budget.
            flops_per_param_token: operations of a token for each parameter counted in N.
            ratio: r of the model.

        Raises:
            ValueError: `alpha` or `beta` is not positive, so there is no optimum.
        """
        if not self.has_optimum:
            raise ValueError(
                f"alpha is {self.alpha:.4g} and beta {self.beta:.4g}: only positive ones have a "
                "compute optimum; the table does not show that size or tokens help"
            )
        effective = self.A * ratio ** -(self.alpha * (self.gamma or 0.0))
        # From d/dN of A N^-alpha + B (flops / (k N))^-beta = 0.
        scale = (self.alpha * effective / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        budget = flops / flops_per_param_token
        params = scale * budget**self.params_exponent
        tokens = budget / params
        loss = self.loss(np.array(params), np.array(tokens), np.array(ratio))
        return Allocation(flops, float(params), float(tokens), float(loss))
