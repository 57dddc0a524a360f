"""Computes experts of a single neuron that are found by product keys (PEER, arXiv 2407.04153).

A layer has n^2 experts, each a row of two tables: expert e sends act(x . in_e) times out_e. Each
head makes a query of two halves of a token. A half is compared with n half keys of its side, and
expert (i, j) has the sum of the scores of i and j. The k best sums are among those of the k best
of each side, so that 2 n comparisons and k^2 sums find the best of n^2 experts. A head weighs its
k experts by the softmax of their scores; heads, which share keys and experts, are added up.

Queries are normalised by their root mean square, where PEER normalises them over the batch, which
would let a token look at others.

Shape suffixes: T tokens, H hidden size, P heads, C two sides, N half keys of a side, D size of a
half key, K experts of a head, E experts (N times N).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mone_megatron.methods.activations import up_function
from mone_megatron.mone.megatron_settings import GATED_MLP, refuse_unread

# What the mean square of a query is made larger by.
_EPS = 1e-6


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


class ProductKeyExperts(MegatronModule):
    """Is a layer's MLP of single-neuron experts; every rank has all of them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        *,
        keys: int,
        key_dim: int,
        heads: int,
        experts_per_head: int,
        **more: Any,
    ) -> None:
        """Allocates the layer; :mod:`mone_megatron.model.initialize` fills it.

        Args:
            config: megatron-core's configuration of the model.
            submodules: none; megatron-core gives a module its own.
            keys: n, half keys of a side; there are n^2 experts.
            key_dim: the size of a half key.
            heads: queries of a token.
            experts_per_head: k, the experts that a head takes.
            more: what megatron-core gives an MLP beside them; not used.

        Raises:
            ValueError: for settings that it does not read.
        """
        super().__init__(config=config)
        refuse_unread("ProductKeyExperts", config, GATED_MLP)
        assert up_function(config.activation_func) is None, "checked by config.validate"
        self.keys, self.key_dim = keys, key_dim
        self.heads, self.experts_per_head = heads, experts_per_head
        hidden = config.hidden_size
        self.query_weight = self._parameter(heads * 2 * key_dim, hidden)
        self.key_weight = self._parameter(2, keys, key_dim)
        self.expert_in_weight = self._parameter(keys**2, hidden)
        self.expert_out_weight = self._parameter(keys**2, hidden)

    def _parameter(self, *shape: int) -> nn.Parameter:
        device = torch.device("cpu")
        if not self.config.use_cpu_initialization:
            device = torch.device("cuda", torch.cuda.current_device())
        return nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))

    @property
    def key_std(self) -> float:
        """Returns the standard deviation of initial keys, by which scores have one of 1."""
        return float(self.key_dim**-0.5)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """Maps ``[s, b, h]`` to ``[s, b, h]``, and no bias."""
        tokens_TH = hidden_states.flatten(0, -2)
        score_TPK, expert_TPK = self.choose(tokens_TH)
        weight_TPK = score_TPK.softmax(dim=-1).to(tokens_TH.dtype)
        expert_TK = expert_TPK.flatten(1)
        gate_TK = torch.einsum(
            "th,tkh->tk", tokens_TH, F.embedding(expert_TK, self.expert_in_weight)
        )
        hidden_TK = self.config.activation_func(gate_TK) * weight_TPK.flatten(1)
        rows_TKH = F.embedding(expert_TK, self.expert_out_weight)
        output_TH = torch.einsum("tk,tkh->th", hidden_TK, rows_TKH)
        return output_TH.view_as(hidden_states), None

    def choose(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each head's k experts: scores, fp32, and numbers, each ``[T, P, K]``."""
        query_TPCD = F.linear(tokens_TH, self.query_weight).unflatten(-1, (self.heads, 2, -1))
        query_TPCD = F.rms_norm(query_TPCD.float(), (self.key_dim,), eps=_EPS)
        scores_TPCN = torch.einsum("tpcd,cnd->tpcn", query_TPCD, self.key_weight.float())
        return product_topk(scores_TPCN, self.experts_per_head)
