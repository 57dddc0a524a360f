"""Computes experts of a few rows on CPU: the gate whole, of up and down the kept rows only.

Reading the weights is what takes the time there. torch's functions for it read each row once and
copy none: a sampled product is a dot product with each row of a list, an embedding bag a weighted
sum of rows.

Shape suffixes: N tokens, K experts of a token, S rows (N * K), E experts, F neurons of an expert,
H hidden size, P kept neurons of a row, M all kept neurons (S * P).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_vllm.selection import Selection

# With more rows for an expert its neurons are read again and again. Measured: half of the neurons
# are worth gathering for one row an expert, a quarter for twelve; more were not tried.
_RATIO_OF_ONE_ROW = 0.5
_MOST_ROWS_OF_AN_EXPERT = 8.0
# What choosing and gathering costs for each row, in bytes that could be read instead.
_OVERHEAD_BYTES = 4_000_000


@dataclass(frozen=True)
class GatheredRows:
    """Holds the weights of one layer's experts, and says which of their rows are read."""

    selection: Selection
    gate_up_EFH: Tensor
    down_EFH: Tensor

    @classmethod
    def of(
        cls, selection: Selection | None, gate_up_EFH: Tensor, down_EFH: Tensor
    ) -> GatheredRows | None:
        """Returns the rows of a layer, or None where a rule, a score or a dtype needs all of them.

        Args:
            selection: None keeps all neurons.
            gate_up_EFH: gate and up projections, ``[E, 2 F, H]``.
            down_EFH: down projections.
        """
        # The sampled product knows fp32 only.
        if gate_up_EFH.dtype != torch.float32 or selection is None or not selection.is_top_k:
            return None
        if selection.score.reads_up or selection.reads_down_norm:
            return None
        _accept_beta_warning()
        return cls(selection, gate_up_EFH, down_EFH)

    def pays(self, tokens: int, chosen: int) -> bool:
        """Returns whether gathering reads enough less than whole matrices, for so many tokens."""
        rows = tokens * chosen
        ratio = self.selection.budget.kept / self.selection.budget.neurons
        saved = 1 - ratio
        most = min(_MOST_ROWS_OF_AN_EXPERT, (_RATIO_OF_ONE_ROW / ratio) ** 3)
        experts, neurons, hidden = self.down_EFH.shape
        saved_bytes = 2 * saved * neurons * hidden * self.down_EFH.element_size()
        few = 0 < rows <= most * experts
        return few and saved_bytes >= _OVERHEAD_BYTES

    def compute(self, hidden_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        """Returns the experts' output, ``[N, H]``.

        Args:
            hidden_NH: fp32.
            weights_NK: the router's.
            ids_NK: int64; -1 for an expert of another rank, which adds nothing.
        """
        tokens, chosen = ids_NK.shape
        neurons, hidden = self.down_EFH.shape[1:]
        # Rows of one expert beside each other, so that its gate is read once.
        expert_S, order_S = ids_NK.flatten().sort(stable=True)
        x_SH = hidden_NH[order_S // chosen]
        weight_S = weights_NK.flatten()[order_S].masked_fill(expert_S < 0, 0.0)
        expert_S = expert_S.clamp(min=0)
        gate_SF = x_SH.new_empty(len(x_SH), neurons)
        end = 0
        for expert, rows in groupby(expert_S.tolist()):
            first, end = end, end + sum(1 for _ in rows)
            gate_EF = self.gate_up_EFH[expert, :neurons]
            gate_SF[first:end] = F.linear(x_SH[first:end], gate_EF)
        k = self.selection.budget.kept
        place_M = self._kept(gate_SF)
        starts = torch.arange(0, len(x_SH) * k + 1, k)
        if len(place_M) != len(x_SH) * k:  # a row of NaNs keeps none
            return torch.full_like(hidden_NH, torch.nan)
        neuron_SP = (place_M % neurons).view(-1, k)
        row_M = (neuron_SP + (expert_S * 2 * neurons + neurons).unsqueeze(-1)).flatten()
        up_M = _dots(x_SH, self.gate_up_EFH.view(-1, hidden), row_M, starts)
        hidden_M = self.selection.activate(gate_SF.take(place_M)) * up_M
        hidden_M = hidden_M * weight_S.repeat_interleave(k)
        out_SH = F.embedding_bag(
            (neuron_SP + (expert_S * neurons).unsqueeze(-1)).flatten(),
            self.down_EFH.view(-1, hidden),
            starts,
            mode="sum",
            per_sample_weights=hidden_M,
            include_last_offset=True,
        )
        if tokens == 1:
            return out_SH.sum(dim=0, keepdim=True)
        unsorted_SH = torch.empty_like(out_SH).index_copy_(0, order_S, out_SH)
        return unsorted_SH.view(tokens, chosen, hidden).sum(dim=1)

    def _kept(self, gate_SF: Tensor) -> Tensor:
        """Returns the places of kept neurons in ``[S, F]``, counted through, ``[M]``.

        They are those of the selection's mask. numpy's partition finds a row's K-th score faster
        than anything in torch; only where others tie with it is the mask itself computed.
        """
        k, rows = self.selection.budget.kept, len(gate_SF)
        scores_SF = self.selection.scores(gate_SF, gate_SF, None).numpy()
        least = scores_SF.shape[1] - k
        kth_S1 = np.partition(scores_SF, least, axis=1)[:, least : least + 1]
        place_M = np.flatnonzero(scores_SF >= kth_S1)
        if len(place_M) == rows * k:
            return torch.from_numpy(place_M)
        return self.selection.mask(gate_SF, gate_SF).flatten().nonzero().squeeze(-1)


def _dots(x_SH: Tensor, rows_RH: Tensor, row_M: Tensor, starts: Tensor) -> Tensor:
    """Returns the products of each row of x with the rows that it lists, ``[M]``."""
    pattern = torch.sparse_csr_tensor(
        starts,
        row_M,
        x_SH.new_zeros(len(row_M)),
        (len(x_SH), len(rows_RH)),
        check_invariants=False,
    )
    product: Tensor = torch.sparse.sampled_addmm(pattern, x_SH, rows_RH.T, beta=0.0)
    return product.values()


@cache
def _accept_beta_warning() -> None:
    """Takes torch's warning that sparse CSR tensors are beta, which users need not hear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        empty = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), empty, torch.zeros(0), (1, 1))
