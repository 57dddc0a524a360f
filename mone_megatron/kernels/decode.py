"""Computes experts for a few tokens at a time, reading only the rows of kept neurons.

While a text is generated, a step multiplies one token (or a few) by large matrices, and reading the
weights is what takes the time. The gate projection has to be read in full, since it says which
neurons a token keeps; of up and down projection only the K kept rows are. With keep ratio r that is
(1 + 2r) / 3 of the bytes, so the limit of the speed-up is 3 / (1 + 2r) for one token, and less for
more tokens, since experts and neurons are shared (:func:`speed_limit`).

Weights lie neuron by neuron: gate, up and down row of a neuron are contiguous.

On CUDA it is four Triton kernels (:mod:`.triton_decode`). On CPU both gathers are torch functions
that read each row once and copy none: ``torch.sparse.sampled_addmm`` is a dot product with each row
of a list, ``F.embedding_bag`` a weighted sum of rows. Inference only: no gradients.

Shape suffixes: N tokens, K experts of a token, S slots (a token once for each of its experts), E
experts, F neurons of one expert, H hidden size, M kept neurons of all slots, B blocks of neurons;
P kept neurons of one slot.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import cpu, ops
from mone_megatron.kernels.reference import Activate, TopK, neuron_scores
from mone_megatron.methods.scores import SCORES

# Into how many blocks a matrix is cut: enough for a few threads. One thread loses nothing by it.
_BLOCKS = 8


@dataclass(frozen=True)
class ExpertWeights:
    """Holds three rows a neuron, ``[E, F, H]`` each; views of whatever holds them.

    Raises:
        ValueError: when the values of a row do not lie side by side.
    """

    gate_EFH: Tensor
    up_EFH: Tensor
    down_EFH: Tensor

    def __post_init__(self) -> None:
        """Checks the layout."""
        for name, weight_EFH in (
            ("gate", self.gate_EFH), ("up", self.up_EFH), ("down", self.down_EFH),
        ):  # fmt: skip
            hidden = weight_EFH.shape[-1]
            if weight_EFH.stride(-1) != 1 or any(step % hidden for step in weight_EFH.stride()[:2]):
                raise ValueError(
                    f"{name} projection: rows of neurons are not contiguous (shape "
                    f"{tuple(weight_EFH.shape)}, strides {weight_EFH.stride()})"
                )


def speed_limit(tokens: int, *, experts: int, chosen: int, keep_ratio: float) -> float:
    """Returns the largest possible speed-up over experts that read whole matrices, by bytes read.

    For ``tokens`` tokens which choose ``chosen`` of ``experts`` experts, and ``keep_ratio`` of
    their neurons, independently of each other: with a the share of experts that some token takes
    and b the share of neurons, 3a / (a + 2b).

    Raises:
        ValueError: for numbers that are not of a mixture of experts.
    """
    if tokens < 1 or not 1 <= chosen <= experts or not 0 < keep_ratio <= 1:
        raise ValueError(
            f"speed_limit: {tokens} tokens, {chosen} of {experts} experts, "
            f"keep ratio {keep_ratio:g}"
        )
    share = chosen / experts
    touched = 1 - (1 - share) ** tokens
    kept = 1 - (1 - keep_ratio * share) ** tokens
    return 3 * touched / (touched + 2 * kept)


def sparse_experts(
    tokens_NH: Tensor,
    experts_NK: Tensor,
    probs_NK: Tensor,
    weights: ExpertWeights,
    keep: TopK,
    activate: Activate = F.silu,
) -> Tensor:
    """Returns the experts' output, reading the rows of kept neurons only.

    Equal to the reference up to the order of sums. The kept neurons are the reference's exactly for
    the gate that is computed here. A NaN in the gate of a token and expert makes the token's output
    NaN, as there; one in the up projection of a neuron that is not kept is not seen.

    Args:
        tokens_NH: fp32, bf16 or fp16.
        experts_NK: int64, the experts of each token.
        probs_NK: the router's weights of those experts.
        weights: of this layer, in the dtype of the tokens.
        keep: the rule of selection.
        activate: the function that gives the activation a of the gate projection g.

    Returns:
        ``[N, H]`` in the dtype of the tokens.
    """
    if ops.on_triton(tokens_NH):
        from mone_megatron.kernels import fused_decode

        if fused_decode.supports(weights.gate_EFH, weights.up_EFH, activate):
            return fused_decode.sparse_experts(
                tokens_NH,
                experts_NK,
                probs_NK,
                weights.gate_EFH,
                weights.up_EFH,
                weights.down_EFH,
                keep,
                activate,
            )
    tokens, chosen = experts_NK.shape
    expert_S, prob_S, order_S = experts_NK.flatten(), probs_NK.flatten(), None
    if tokens == 1:
        tokens_SH = tokens_NH.expand(chosen, -1)
    else:
        # Slots of one expert beside each other, so that its rows are read once.
        expert_S, order_S = expert_S.sort(stable=True)
        tokens_SH, prob_S = tokens_NH[order_S // chosen], prob_S[order_S]
    gate_SF = _project(tokens_SH, expert_S, weights.gate_EFH)
    reads_up = SCORES[keep.score].reads_up
    up_SF = _project(tokens_SH, expert_S, weights.up_EFH) if reads_up else gate_SF
    kept = _Kept.of(neuron_scores(gate_SF, up_SF, keep.score, activate), keep.k)
    if reads_up:
        up_M = up_SF.take(kept.place_M)
    else:
        rows_RH, row_M = _rows(weights.up_EFH, expert_S, kept.neuron_SP)
        up_M = _dots(tokens_SH, rows_RH, row_M, kept.start_S)
    weight_SP = activate(gate_SF.take(kept.place_M)).view(-1, keep.k) * prob_S.unsqueeze(-1)
    # In the dtype of the tokens, as the reference rounds it.
    hidden_M = (weight_SP.flatten() * up_M).to(tokens_NH.dtype)
    rows_RH, row_M = _rows(weights.down_EFH, expert_S, kept.neuron_SP)
    output_SH = F.embedding_bag(
        row_M,
        rows_RH,
        kept.start_S,
        mode="sum",
        per_sample_weights=hidden_M,
        include_last_offset=True,
    )
    if kept.nan_S is not None:
        output_SH.masked_fill_(kept.nan_S.unsqueeze(-1), torch.nan)
    if order_S is None:
        return output_SH.sum(dim=0, keepdim=True)
    unsorted_SH = torch.empty_like(output_SH).index_copy_(0, order_S, output_SH)
    return unsorted_SH.view(tokens, chosen, -1).sum(dim=1)


@dataclass(frozen=True)
class _Kept:
    """Holds the neurons that each slot keeps, as many for each: M is S times P."""

    # In ``[S, F]``, counted through.
    place_M: Tensor
    neuron_SP: Tensor
    # Where each slot's begin, and the last one's end.
    start_S: Tensor
    # Slots with a NaN among their scores, which keep nothing; None if there are none.
    nan_S: Tensor | None

    @classmethod
    def of(cls, scores_SF: Tensor, k: int) -> _Kept:
        slots, neurons = scores_SF.shape
        # With the caches full of weights every operation costs ten times what it otherwise does:
        # on CPU one function that takes few.
        place_M = None if scores_SF.is_cuda else cpu.kept_places(scores_SF, k)
        nan_S = None
        if place_M is None:
            mask_SF = ops.topk_mask(scores_SF, k)
            nan_S = scores_SF.isnan().any(dim=-1)
            # Any ``k`` of them: what comes out is overwritten.
            mask_SF[nan_S] = torch.arange(neurons, device=mask_SF.device) < k
            place_M = mask_SF.flatten().nonzero().squeeze(-1)
        device = scores_SF.device
        first_S1 = torch.arange(0, slots * neurons, neurons, device=device).unsqueeze(-1)
        start_S = torch.arange(0, slots * k + 1, k, device=device)
        return cls(place_M, place_M.view(slots, k) - first_S1, start_S, nan_S)


def linear_by_blocks(tokens_NH: Tensor, weight_FH: Tensor) -> Tensor:
    """Returns ``tokens @ weight.T`` for a few tokens, ``[N, F]``.

    The weight is taken as several blocks of rows: torch multiplies a vector by one matrix on one
    thread, by several on all of them.
    """
    neurons, hidden = weight_FH.shape
    blocks = gcd(neurons, _BLOCKS)
    weight_BFH = weight_FH.view(blocks, neurons // blocks, hidden)
    result_BNF = torch.bmm(tokens_NH.expand(blocks, -1, -1), weight_BFH.mT)
    return result_BNF.transpose(0, 1).reshape(-1, neurons)


def _project(tokens_SH: Tensor, expert_S: Tensor, weight_EFH: Tensor) -> Tensor:
    """Returns products ``[S, F]``; each expert's matrix is read once, for all of its slots."""
    result_SF = tokens_SH.new_empty(len(expert_S), weight_EFH.shape[1])
    end = 0
    for expert, slots in groupby(expert_S.tolist()):
        first, end = end, end + sum(1 for _ in slots)
        result_SF[first:end] = linear_by_blocks(tokens_SH[first:end], weight_EFH[expert])
    return result_SF


def _rows(weight_EFH: Tensor, expert_S: Tensor, neuron_SP: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all rows of the storage as one matrix, and the numbers of those wanted, ``[M]``."""
    experts, neurons, hidden = weight_EFH.shape
    expert_step, neuron_step = (step // hidden for step in weight_EFH.stride()[:2])
    count = (experts - 1) * expert_step + (neurons - 1) * neuron_step + 1
    rows_RH = weight_EFH.as_strided((count, hidden), (hidden, 1))
    row_SP = (expert_S * expert_step).unsqueeze(-1) + neuron_SP * neuron_step
    return rows_RH, row_SP.flatten()


def _dots(tokens_SH: Tensor, rows_RH: Tensor, row_M: Tensor, starts: Tensor) -> Tensor:
    """Returns the products of each slot's token with its rows, ``[M]``."""
    if tokens_SH.dtype not in (torch.float32, torch.float64) or tokens_SH.is_cuda:
        # The sampled product knows neither: copied rows, one slot after the other.
        products = [
            rows_RH[row_M[first:end]] @ token_H
            for token_H, first, end in zip(
                tokens_SH, starts[:-1].tolist(), starts[1:].tolist(), strict=True
            )
        ]
        return torch.cat(products)
    _accept_beta_warning()
    pattern = torch.sparse_csr_tensor(
        starts,
        row_M,
        tokens_SH.new_zeros(len(row_M)),
        (len(tokens_SH), len(rows_RH)),
        check_invariants=False,
    )
    product: Tensor = torch.sparse.sampled_addmm(pattern, tokens_SH, rows_RH.T, beta=0.0)
    return product.values()


@cache
def _accept_beta_warning() -> None:
    """Takes torch's warning that sparse CSR tensors are beta, which users need not hear."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        empty = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), empty, torch.zeros(0), (1, 1))
