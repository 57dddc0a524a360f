"""Scores by |a u|, the magnitude of what a neuron sends to its row of the down projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mone_megatron.methods.score import Neurons, Score

if TYPE_CHECKING:
    from torch import Tensor


def abs_product(neurons: Neurons) -> Tensor:
    """Returns |a u|."""
    return neurons.product.abs()


METHOD = Score(
    name="abs_product",
    formula="|a u|",
    source="an ablation of arXiv 2510.05781",
    function=abs_product,
    reads=frozenset({"product"}),
    fused="mone_megatron.kernels.triton_scores:product_score",
)
