"""Routes by thresholds of the experts' own, over the cosine between a token and an expert.

An expert takes a token where the sigmoid of their cosine is above the sigmoid of a number that the
expert learns; a token that none takes goes to the one of largest cosine. All experts of a token
weigh the same. Gradients pass the step as if it were the difference itself, at chosen experts.

The authors leave a token that no expert takes without one in training, and give it one otherwise.
Their loss is even loads, few experts, and directions that are short and at right angles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mone_megatron.methods.router import (
    Linear,
    RoutedWeights,
    Router,
    RouterSettings,
    RouterWeight,
    one_row_each,
)

if TYPE_CHECKING:
    from torch import Tensor

# The least length of a vector, and what the difference is where no other is above 0.
_SHORTEST, _LIFTED = 1e-12, 1e-3


def weights(settings: RouterSettings) -> Mapping[str, RouterWeight]:
    """Returns a direction and a threshold for each expert."""
    return {
        **one_row_each(settings),
        "threshold": RouterWeight((settings.experts,), initial=0.0),
    }


def differences(
    tokens: Tensor, held: Mapping[str, Tensor], linear: Linear, settings: RouterSettings
) -> Tensor:
    """Returns how far scores are above thresholds, ``[..., A]``; one of them is above 0."""
    rows_AH = held["weight"].float()
    products = linear(tokens, rows_AH / rows_AH.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST))
    # In bf16 a lifted difference could be rounded to 0.
    wide = products if products.dtype.itemsize > 2 else products.float()
    lengths = tokens.to(wide.dtype).norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
    scores = (wide / lengths).sigmoid()
    above = scores - held["threshold"].to(wide.dtype).sigmoid()
    # Sorted stably, so that of equal scores the first expert's counts.
    best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :1]
    alone = (above <= 0).all(dim=-1, keepdim=True)
    lifted = alone.new_zeros(above.shape).scatter(-1, best, alone)
    return (above + lifted * (_LIFTED - above.detach())).to(products.dtype)


def all_above(differences_NA: Tensor) -> Tensor:
    """Returns the weights ``[N, A]``: the same for each expert whose difference is above 0."""
    chosen_NA = (differences_NA > 0).to(differences_NA.dtype)
    # 1, whose gradient is that of the difference.
    step_NA = 1 + (differences_NA - differences_NA.detach())
    return chosen_NA * step_NA / chosen_NA.sum(dim=-1, keepdim=True).clamp_min(1)


def apart_and_short(rows_AH: Tensor) -> Tensor:
    """Returns the Frobenius norm of the directions' cosines less the identity, and the mean length.

    It is an fp32 scalar; ``rows_AH`` are the directions of the experts.
    """
    from torch import eye
    from torch.linalg import matrix_norm, vector_norm

    wide_AH = rows_AH.float()
    lengths_A1 = vector_norm(wide_AH, dim=-1, keepdim=True)
    unit_AH = wide_AH / lengths_A1.clamp_min(_SHORTEST)
    cosines_AA = unit_AH @ unit_AH.T
    same_AA = eye(len(wide_AH), dtype=wide_AH.dtype, device=wide_AH.device)
    apart: Tensor = matrix_norm(cosines_AA - same_AA)
    return apart + lengths_A1.mean()


def loss(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of the three parts of the loss, which all count the same."""
    return even_and_few(routed) + routed.share * apart_and_short(routed.held["weight"])


def even_and_few(routed: RoutedWeights) -> Tensor:
    """Returns this rank's part of A times sum of share times mean weight, and of the mean density.

    A token's weights add up to 1 in the first, whose gradient knows it.
    """
    weights_NA = routed.weights_NA.float()
    experts = weights_NA.shape[-1]
    steps_NA = weights_NA * (weights_NA > 0).sum(dim=-1, keepdim=True)
    parts_NA = steps_NA / steps_NA.sum(dim=-1, keepdim=True).clamp_min(1)
    share_A = routed.tokens_A.float() / routed.tokens
    even = experts * (share_A * parts_NA.sum(dim=0) / routed.tokens).sum()
    return even + steps_NA.sum() / (routed.tokens * experts)


METHOD = Router(
    name="dynmoe",
    formula="the experts with sigmoid(cos(x, w)) > sigmoid(g), at least one, all with one weight",
    source="DynMoE, arXiv 2405.14297",
    weights=weights,
    logits=differences,
    assign=lambda logits_NA, settings: all_above(logits_NA),
    fixed_count=False,
    latent=lambda settings: 2 * settings.experts,
    loss=loss,
)
