"""Routes by top-p over experts: the fewest experts that hold a share p of a token's weights.

Tokens that are hard to route go to more experts. p is ``model.router.options.top_p``; nothing
steers it to ``model.experts_per_token``, so the number of experts a token is what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mone_megatron.methods.bound import Within
from mone_megatron.methods.router import Router

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Holds the options."""

    top_p: Annotated[float, Within("(0, 1]", example=0.4)] = 0.4
    """The share of a token's weights that its experts hold."""


def top_p(logits_NA: Tensor, p: float) -> Tensor:
    """Returns the weights ``[N, A]`` of the chosen experts, and 0 at others.

    Args:
        logits_NA: the router's logits of N tokens and A experts.
        p: experts are taken, largest weight first, while those before hold less; at least one.
    """
    scores_NA = logits_NA.float().softmax(dim=-1)
    sorted_NA, order_NA = scores_NA.detach().sort(dim=-1, descending=True, stable=True)
    taken_NA = sorted_NA.cumsum(dim=-1) - sorted_NA < p
    chosen_NA = taken_NA.new_zeros(taken_NA.shape).scatter(-1, order_NA, taken_NA)
    return (scores_NA * chosen_NA).type_as(logits_NA)


METHOD = Router(
    name="top_p",
    formula="the fewest experts that hold a share p of the token's weights",
    source="arXiv 2403.07652",
    assign=lambda logits_NA, settings: top_p(logits_NA, settings.options.top_p),
    fixed_count=False,
    options=Options,
)
