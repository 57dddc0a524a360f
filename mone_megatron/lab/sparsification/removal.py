"""Removes experts or neurons for good, or skips experts of a token, as calibration text says.

    neurons        the neurons of each expert with the least mean, over its tokens, of
                   p |a u| ||Wd row||, with p the router's weight of the expert
    reap           the experts with the least mean, over their tokens, of p ||output||: the
                   router-weighted expert activation (Lasby et al., arXiv 2510.13999)
    naee           the set of experts without which the output of the layer's mixture changes least,
                   in the Frobenius norm over the text, by trying all sets (Lu et al., "Not All
                   Experts are Equal", arXiv 2402.14800)
    naee_skip      for each token the experts whose weight is below beta times its largest; the same
                   paper has it of two experts a token, with the median ratio of a layer as beta.
                   Here beta is the quantile that skips the wanted share. What is left of the
                   weights keeps their sum, as two that are normalised do
    super_experts  those whose output has an entry above the 99.5th percentile of all experts'
                   largest entries, and above a tenth of the largest (Su et al., arXiv 2507.23279,
                   who also ask that massive activations begin in the layer)

The router of a layer chooses among the experts that are left, as if the others had never been.

Shape suffixes: T rows (a token once for each of its experts), F neurons of one expert, E experts, N
tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mone_megatron.lab.sparsification.places import ExpertsPlace
from mone_megatron.lab.sparsification.plans import CONTRIBUTION, kept_neurons
from mone_megatron.lab.sparsification.ranking import Rows, score_rows

# An outlier is above this quantile of all experts' largest outputs, and this part of the largest.
_OUTLIER_QUANTILE, _OUTLIER_PART = 0.995, 0.1


class ExpertStatistics:
    """Adds up what experts and their neurons put out; it is a ``ranking.Choose``.

    Attributes:
        tokens_E: int64, how many tokens each expert had.
        outputs_E: float64, sum of p ||output|| over them.
        largest_E: fp32, the largest entry of an output, in magnitude.
        neurons_EF: float64, sum of p |a u| ||Wd row|| over them.
    """

    def __init__(self, experts: int, neurons: int) -> None:
        self.tokens_E = torch.zeros(experts, dtype=torch.int64)
        self.outputs_E = torch.zeros(experts, dtype=torch.float64)
        self.largest_E = torch.zeros(experts)
        self.neurons_EF = torch.zeros(experts, neurons, dtype=torch.float64)

    def __call__(self, rows: Rows) -> None:
        """Adds some rows; all neurons stay."""
        hidden_TF, sizes_TF = rows.hidden_TF, score_rows(CONTRIBUTION, rows).double()
        if rows.own_TF is not None:
            hidden_TF, sizes_TF = hidden_TF * rows.own_TF, sizes_TF * rows.own_TF
        assert rows.down is not None, "places give it"
        output_TH = rows.down(hidden_TF)
        expert_T = rows.expert_T.cpu()
        norm_T = output_TH.float().norm(dim=-1).double()
        if rows.routed is not None:
            norm_T = norm_T * rows.routed.weight_T.double()
        self.tokens_E += torch.bincount(expert_T, minlength=len(self.tokens_E))
        self.outputs_E.index_add_(0, expert_T, norm_T.cpu())
        self.neurons_EF.index_add_(0, expert_T, sizes_TF.cpu())
        entry_T = output_TH.float().abs().amax(dim=-1).cpu()
        self.largest_E.scatter_reduce_(0, expert_T, entry_T, "amax")

    @property
    def saliency_E(self) -> Tensor:
        """Returns REAP's score of each expert, float64 ``[E]``; 0 of those without a token."""
        return self.outputs_E / self.tokens_E.clamp(min=1)


def least_experts(saliency_E: Tensor, count: int) -> tuple[int, ...]:
    """Returns the ``count`` experts with the least saliency, ascending; of equals the last."""
    # Those that stay are the first of equals, as in every selection.
    order = torch.sort(saliency_E, descending=True, stable=True).indices
    return tuple(sorted(order[len(order) - count :].tolist()))


def kept_for_good(neurons_EF: Tensor, share: float) -> Tensor:
    """Returns the neurons of each expert that stay, bool ``[E, F]``: those of the largest sums."""
    kept = kept_neurons(share, neurons_EF.shape[-1])
    order_EF = torch.sort(neurons_EF, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(neurons_EF, dtype=torch.bool).scatter(-1, order_EF[:, :kept], True)


def super_experts(largest_LE: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Returns the layer (in the order given) and number of the super experts; see the module."""
    values = np.concatenate([np.asarray(row, dtype=np.float64) for row in largest_LE])
    bound = max(float(np.quantile(values, _OUTLIER_QUANTILE)), _OUTLIER_PART * float(values.max()))
    return [
        (layer, expert)
        for layer, row in enumerate(largest_LE)
        for expert, value in enumerate(row)
        if value > bound
    ]


class WeightRatios:
    """Collects the ratios of a token's weights to its largest; it is a ``ranking.Choose``."""

    def __init__(self) -> None:
        self._ratios: list[Tensor] = []
        self._rows = 0

    def __call__(self, rows: Rows) -> None:
        """Collects those of some tokens; all neurons stay."""
        assert rows.routed is not None, "only experts have weights"
        weight_T, token_T = rows.routed.weight_T.float(), rows.routed.token_T
        largest_N = torch.zeros(int(token_T.max()) + 1, device=weight_T.device)
        largest_N.scatter_reduce_(0, token_T, weight_T, "amax")
        ratio_T = weight_T / largest_N[token_T]
        self._ratios.append(ratio_T.cpu())
        self._rows += len(ratio_T)

    def beta(self, share: float) -> float:
        """Returns the ratio that ``share`` of a token's experts are below; see :func:`skipping`."""
        ratios, _ = torch.cat(self._ratios).sort()
        return float(ratios[min(round(share * len(ratios)), len(ratios) - 1)])


def skipping(weights_NK: Tensor, beta: float) -> Tensor:
    """Returns the weights ``[N, K]`` with those below ``beta`` times the largest at 0.

    The others grow so that their sum stays.
    """
    kept_NK = weights_NK * (weights_NK >= beta * weights_NK.amax(dim=-1, keepdim=True))
    return kept_NK * (weights_NK.sum(dim=-1, keepdim=True) / kept_NK.sum(dim=-1, keepdim=True))


class SetErrors:
    """Adds up how much a layer's mixture changes without each of some sets of experts.

    Attributes:
        errors: squared Frobenius norm of the change, by set.
    """

    def __init__(self, experts: int, counts: Sequence[int]) -> None:
        """Begins with no error of any set of ``counts`` out of ``experts`` experts."""
        self.errors = {
            gone: 0.0 for count in counts for gone in combinations(range(experts), count)
        }

    @contextmanager
    def watching(self, place: ExpertsPlace) -> Iterator[None]:
        """Runs the mixture without each set on whatever goes through it."""
        busy = False

        def compare(block: nn.Module, arguments: Any, named: Any, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                for gone in self.errors:
                    with place.without(gone):
                        other = block(*arguments, **named)
                    self.errors[gone] += float(
                        (_first(other) - _first(output)).double().norm() ** 2
                    )
            finally:
                busy = False

        handle = place.block.register_forward_hook(compare, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def best(self, count: int) -> tuple[int, ...]:
        """Returns the set of ``count`` experts without which the least changes."""
        sets = [gone for gone in self.errors if len(gone) == count]
        return min(sets, key=lambda gone: self.errors[gone])


def _first(output: Any) -> Tensor:
    """Returns the hidden states of a module that may give more than them."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
