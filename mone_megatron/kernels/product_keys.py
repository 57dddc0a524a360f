"""Defines experts of a single neuron that are found by product keys (PEER, arXiv 2407.04153).

A layer has n^2 experts, each a row of two tables: expert e sends act(x . in_e) times out_e. Each
head makes a query of two halves of a token. A half is compared with n half keys of its side, and
expert (i, j) has the sum of the scores of i and j. The k best sums are among those of the k best
of each side, so that 2 n comparisons and k^2 sums find the best of n^2 experts. A head weighs its
k experts by the softmax of their scores; heads, which share keys and experts, are added up.

Queries are normalised by their root mean square, where PEER normalises them over the batch, which
would let a token look at others.

Training and exports compute these functions; this file is copied into exported models.

Shape suffixes: T tokens, H hidden size, P heads, C two sides, N half keys of a side, D size of a
half key, K experts of a head, E experts (N times N).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# What the mean square of a query is made larger by.
_EPS = 1e-6


@dataclass(frozen=True)
class ProductKeySizes:
    """Holds the sizes of a layer: the keys of ``model.product_key``, and of an export's settings.

    Attributes:
        keys: n, half keys of a side; there are n^2 experts.
        key_dim: the size of a half key.
        heads: queries of a token.
        experts_per_head: k, the experts that a head takes.
    """

    keys: int
    key_dim: int
    heads: int
    experts_per_head: int

    def weights(self, hidden: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of each weight of a layer, by its name.

        Args:
            hidden: H, the values of a token.
        """
        return {
            "query_weight": (self.heads * 2 * self.key_dim, hidden),
            "key_weight": (2, self.keys, self.key_dim),
            "expert_in_weight": (self.keys**2, hidden),
            "expert_out_weight": (self.keys**2, hidden),
        }

    @property
    def key_std(self) -> float:
        """Returns the standard deviation of initial keys, by which scores have one of 1."""
        return float(self.key_dim**-0.5)


def product_topk(scores_TPCN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the best pairs of half keys.

    Args:
        scores_TPCN: the score of each half key, of two sides.
        k: how many pairs are wanted, at most N^2.

    Returns:
        Their scores and their numbers i N + j, each ``[T, P, K]``, best first.
    """
    count = scores_TPCN.shape[-1]
    best = scores_TPCN.topk(min(k, count), dim=-1)
    first_TPK, second_TPK = best.values.unbind(dim=-2)
    sums_TPKK = first_TPK.unsqueeze(-1) + second_TPK.unsqueeze(-2)
    one_TPK, other_TPK = best.indices.unbind(dim=-2)
    pair_TPKK = one_TPK.unsqueeze(-1) * count + other_TPK.unsqueeze(-2)
    scores_TPK, place_TPK = sums_TPKK.flatten(-2).topk(k, dim=-1)
    return scores_TPK, pair_TPKK.flatten(-2).gather(-1, place_TPK)


def choose(
    tokens_TH: Tensor, weights: Mapping[str, Tensor], sizes: ProductKeySizes
) -> tuple[Tensor, Tensor]:
    """Returns each head's k experts: scores, fp32, and numbers, each ``[T, P, K]``."""
    query_TPCD = F.linear(tokens_TH, weights["query_weight"]).unflatten(-1, (sizes.heads, 2, -1))
    query_TPCD = F.rms_norm(query_TPCD.float(), (sizes.key_dim,), eps=_EPS)
    scores_TPCN = torch.einsum("tpcd,cnd->tpcn", query_TPCD, weights["key_weight"].float())
    return product_topk(scores_TPCN, sizes.experts_per_head)


def product_key_experts(
    tokens_TH: Tensor,
    weights: Mapping[str, Tensor],
    sizes: ProductKeySizes,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns the output ``[T, H]`` of a layer.

    Args:
        tokens_TH: its input.
        weights: by the names of :meth:`ProductKeySizes.weights`.
        sizes: of the layer.
        activate: act, elementwise.
    """
    score_TPK, expert_TPK = choose(tokens_TH, weights, sizes)
    weight_TPK = score_TPK.softmax(dim=-1).to(tokens_TH.dtype)
    expert_TK = expert_TPK.flatten(1)
    gate_TK = torch.einsum(
        "th,tkh->tk", tokens_TH, F.embedding(expert_TK, weights["expert_in_weight"])
    )
    hidden_TK = activate(gate_TK) * weight_TPK.flatten(1)
    rows_TKH = F.embedding(expert_TK, weights["expert_out_weight"])
    return torch.einsum("tk,tkh->th", hidden_TK, rows_TKH)
