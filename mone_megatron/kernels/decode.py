"""Experts for a few tokens at a time: only the rows of kept neurons are read.

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
experts, F neurons of one expert, H hidden size, M kept neurons of all slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import Activate, TopK, neuron_scores


@dataclass(frozen=True)
class ExpertWeights:
    """Three rows a neuron, ``[E, F, H]`` each; views of whatever holds them.

    Raises:
        ValueError: when the values of a row do not lie side by side.
    """

    gate_EFH: Tensor
    up_EFH: Tensor
    down_EFH: Tensor

    def __post_init__(self) -> None:
        """Check the layout."""
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
    """The largest possible speed-up over experts that read whole matrices, by bytes read.

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
    """The experts' output, with the rows of kept neurons only.

    Equal to the reference up to the order of sums. The kept neurons are the reference's exactly for
    the gate that is computed here. A NaN in the gate of a token and expert makes the token's output
    NaN, as there; one in the up projection of a neuron that is not kept is not seen.

    Args:
        tokens_NH: fp32, bf16 or fp16.
        experts_NK: int64, the experts of each token.
        probs_NK: the router's weights of them.
        weights: of this layer, in the dtype of the tokens.
        keep: the rule of selection.
        activate: a as a function of g.

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
    chosen = experts_NK.shape[-1]
    # Slots of one expert beside each other, so that its rows are read once.
    expert_S, order_S = experts_NK.flatten().sort(stable=True)
    tokens_SH = tokens_NH[order_S // chosen]
    gate_SF = _project(tokens_SH, expert_S, weights.gate_EFH)
    activation_SF = activate(gate_SF)
    by_product = keep.score == "abs_product"
    up_SF = _project(tokens_SH, expert_S, weights.up_EFH) if by_product else gate_SF
    mask_SF = ops.topk_mask(neuron_scores(gate_SF, up_SF, keep.score, activate), keep.k)
    slot_M, neuron_M = mask_SF.nonzero().unbind(dim=-1)
    counts_S = mask_SF.sum(dim=-1)
    starts = F.pad(counts_S.cumsum(dim=0), (1, 0))
    expert_M = expert_S[slot_M]
    if by_product:
        up_M = up_SF[slot_M, neuron_M]
    else:
        rows_RH, row_M = _rows(weights.up_EFH, expert_M, neuron_M)
        up_M = _dots(tokens_SH, rows_RH, row_M, starts)
    # All neurons are weighted before some are taken: fewer small operations.
    weight_SF = activation_SF * probs_NK.flatten()[order_S].unsqueeze(-1)
    # In the dtype of the tokens, as the reference rounds it.
    hidden_M = (weight_SF[slot_M, neuron_M] * up_M).to(tokens_NH.dtype)
    rows_RH, row_M = _rows(weights.down_EFH, expert_M, neuron_M)
    output_SH = F.embedding_bag(
        row_M,
        rows_RH,
        starts,
        mode="sum",
        per_sample_weights=hidden_M,
        include_last_offset=True,
    )
    # Only a NaN keeps nothing.
    output_SH.masked_fill_(counts_S.eq(0).unsqueeze(-1), torch.nan)
    unsorted_SH = torch.empty_like(output_SH).index_copy_(0, order_S, output_SH)
    return unsorted_SH.view(-1, chosen, tokens_NH.shape[-1]).sum(dim=1)


def _runs(expert_S: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that has slots, with where they begin and end; slots are sorted by expert."""
    experts, counts = expert_S.unique_consecutive(return_counts=True)
    first = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        yield expert, first, first + count
        first += count


def _project(tokens_SH: Tensor, expert_S: Tensor, weight_EFH: Tensor) -> Tensor:
    """``[S, F]``: each expert's matrix is read once, whatever the number of its slots."""
    result_SF = tokens_SH.new_empty(len(expert_S), weight_EFH.shape[1])
    for expert, first, end in _runs(expert_S):
        torch.mm(tokens_SH[first:end], weight_EFH[expert].T, out=result_SF[first:end])
    return result_SF


def _rows(weight_EFH: Tensor, expert_M: Tensor, neuron_M: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of the storage as one matrix, and the numbers of those that are wanted."""
    experts, neurons, hidden = weight_EFH.shape
    expert_step, neuron_step = (step // hidden for step in weight_EFH.stride()[:2])
    count = (experts - 1) * expert_step + (neurons - 1) * neuron_step + 1
    rows_RH = weight_EFH.as_strided((count, hidden), (hidden, 1))
    return rows_RH, expert_M * expert_step + neuron_M * neuron_step


def _dots(tokens_SH: Tensor, rows_RH: Tensor, row_M: Tensor, starts: Tensor) -> Tensor:
    """The products of each slot's token with its rows, ``[M]``."""
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
    """torch says once that sparse CSR tensors are beta; users of this function need not hear it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        empty = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), empty, torch.zeros(0), (1, 1))
