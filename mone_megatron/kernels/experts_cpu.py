"""Computes all experts of a rank, from tokens to their sums, a few experts after the other.

Operations of all experts, one after the other, write matrices of all rows, which no cache of a core
holds, and the next one reads them. Here the rows of as many experts as a cache holds go through all
of it, forward and backward: copied from their tokens, gate and up projections, selection and gated
unit, down projection, added to their tokens. Only the projections, the activations, the mask and a
few numbers a row are saved. Every sum is made in the order, and every product is the one, of
:mod:`.grouped_cpu`, :mod:`.compiled_glu` and the dispatcher of one rank: the same bits.

Shape suffixes: N tokens, A experts, T rows (a token once per chosen expert), H hidden size, F
neurons of one expert; B the rows of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import ExpertsArguments, address, threads

# Activations of a block of experts: they stay in a core's cache, with all that is made of them.
_BLOCK_ELEMENTS = 131072


@dataclass(frozen=True)
class Rows:
    """Says which rows the experts have; they lie expert after expert.

    Attributes:
        counts_A: int64, the rows of each expert.
        token_T: int64, the token of each row.
        place_T: int64, where the weight of each row is in ``[N, A]``.
    """

    counts_A: Tensor
    token_T: Tensor
    place_T: Tensor


@dataclass(frozen=True)
class Choice:
    """Says which neurons each row keeps: the ``k`` with the largest |a|.

    Attributes:
        k: how many; 0 for all.
        sums: whether the sums of their weights over each expert's rows are wanted.
        normalize: divide the weights of each row by their sum.
    """

    k: int = 0
    sums: bool = False
    normalize: bool = False


def _blocks(counts: Sequence[int], neurons: int, count: int) -> list[tuple[int, int]]:
    """Returns for each block of experts the one after its last, and its rows."""
    ends, rows, most = [], 0, max(1, _BLOCK_ELEMENTS * count // neurons)
    for expert, of_expert in enumerate(counts):
        if rows and rows + of_expert > most:
            ends.append((expert, rows))
            rows = 0
        rows += of_expert
    ends.append((len(counts), rows))
    return ends


class TokensThroughExperts(torch.autograd.Function):
    """Returns the sum of each token's experts, and the sums that :class:`Choice` asks for."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        functions: tuple[Any, int],
        tokens_NH: Tensor,
        probs_NA: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        rows: Rows,
        choice: Choice,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Computes ``[N, H]``, and sums of weights and counts of kept neurons, ``[A, F]``.

        Args:
            ctx: of autograd.
            functions: of :func:`.compiled_cpu.compiled_products`.
            tokens_NH: fp32 tokens.
            probs_NA: fp32, the weight of each expert for each token.
            gate_up_weight: fp32, ``[A, 2, F, H]`` and contiguous. If it has ``main_grad`` and
                ``adds_to_main_grad`` is set on it, its gradient is added there, and autograd is
                told that there is none.
            down_weight: fp32, ``[A, F, H]``, likewise.
            rows: of the experts.
            choice: of neurons.
        """
        library, product = functions
        experts, neurons, hidden = down_weight.shape
        tokens_NH, probs_NA = tokens_NH.contiguous(), probs_NA.contiguous()
        count, total = threads(), len(rows.token_T)
        counts: list[int] = rows.counts_A.tolist()
        blocks = _blocks(counts, neurons, count)
        most = max(of_block for _, of_block in blocks)
        gate_up_TQ, activation_TF = torch.empty(total, 2 * neurons), torch.empty(total, neurons)
        scale_T = torch.empty(total)
        mask_TF = torch.empty(total, neurons, dtype=torch.bool) if choice.k else None
        inverse_T = weight_sum_AF = kept_AF = None
        if choice.sums:
            weight_sum_AF, kept_AF = torch.zeros(2, experts, neurons).unbind()
            inverse_T = torch.empty(total) if choice.normalize else None
        rows_BH, hidden_BF = torch.empty(most, hidden), torch.empty(most, neurons)
        out_NH = torch.zeros(tokens_NH.shape)
        given = ExpertsArguments(
            product=product, width=hidden, neurons=neurons, k=choice.k,
            counts=address(rows.counts_A), token=address(rows.token_T),
            place=address(rows.place_T), tokens=address(tokens_NH), probs=address(probs_NA),
            gate_up_weight=address(gate_up_weight), down_weight=address(down_weight),
            scale=address(scale_T), gate_up=address(gate_up_TQ),
            activation=address(activation_TF), mask=address(mask_TF),
            inverse=address(inverse_T), rows=address(rows_BH), hidden=address(hidden_BF),
            out=address(out_NH), kept=address(kept_AF), weight=address(weight_sum_AF),
            threads=count,
        )  # fmt: skip
        sizes = [of_block for _, of_block in blocks]
        gates = gate_up_TQ[:, :neurons].split_with_sizes(sizes)
        activations = activation_TF.split_with_sizes(sizes)
        where, expert, row = ctypes.byref(given), 0, 0
        for (end, size), gate_BF, activation_BF in zip(blocks, gates, activations, strict=True):
            library.experts_begin(where, expert, end - expert, row, size)
            torch.ops.aten.silu.out(gate_BF, out=activation_BF)
            library.experts_end(where, expert, end - expert, row, size)
            expert, row = end, row + size
        if kept_AF is not None:
            ctx.mark_non_differentiable(kept_AF)
        if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            ctx.save_for_backward(
                tokens_NH, gate_up_weight, down_weight, scale_T, gate_up_TQ, activation_TF,
                mask_TF, inverse_T,  # type: ignore[arg-type]
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.others = library, product, rows, blocks, probs_NA.shape  # type: ignore[attr-defined]
        return out_NH, weight_sum_AF, kept_AF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_NH: Tensor | None,
        grad_sum_AF: Tensor | None,
        _: None,
    ) -> tuple[None, Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        """Returns the gradients of tokens, of their weights, and of the experts' weights."""
        tokens_NH, gate_up_weight, down_weight, scale_T, gate_up_TQ, activation_TF, mask_TF, \
            inverse_T = ctx.saved_tensors  # type: ignore[attr-defined]  # fmt: skip
        library, product, rows, blocks, shape = ctx.others  # type: ignore[attr-defined]
        _, neurons, hidden = down_weight.shape
        grad_NH = torch.zeros(tokens_NH.shape) if grad_NH is None else grad_NH.contiguous()
        grad_sum_AF = None if grad_sum_AF is None else grad_sum_AF.contiguous()
        grad_tokens_NH, grad_probs_NA = torch.zeros(tokens_NH.shape), torch.zeros(shape)
        most = max(of_block for _, of_block in blocks)
        rows_BH, grads_BH = torch.empty(2, most, hidden).unbind()
        hidden_BF, grad_hidden_BF = torch.empty(2, most, neurons).unbind()
        grad_gate_up_BQ, grad_scale_T = torch.empty(most, 2 * neurons), torch.empty(len(scale_T))
        wanted = ctx.needs_input_grad[3:5]  # type: ignore[attr-defined]
        adds = bool(getattr(gate_up_weight, "adds_to_main_grad", False))
        assert adds == bool(getattr(down_weight, "adds_to_main_grad", False))
        grads: list[Tensor | None] = [None, None]
        totals: list[Tensor | None] = [None, None]
        for place, weight in enumerate((gate_up_weight, down_weight)):
            if not wanted[place]:
                continue
            if adds:
                totals[place] = weight.main_grad
                # megatron-core's hook adds what autograd has made, unless this says that it is
                # there.
                weight.grad_added_to_main_grad = True
            else:
                totals[place] = grads[place] = torch.empty_like(weight)
        given = ExpertsArguments(
            product=product, width=hidden, neurons=neurons, counts=address(rows.counts_A),
            token=address(rows.token_T), place=address(rows.place_T), tokens=address(tokens_NH),
            gate_up_weight=address(gate_up_weight), down_weight=address(down_weight),
            scale=address(scale_T), scale_grad=address(grad_scale_T),
            gate_up=address(gate_up_TQ), activation=address(activation_TF),
            mask=address(mask_TF), inverse=address(inverse_T), rows=address(rows_BH),
            hidden=address(hidden_BF), grad_out=address(grad_NH),
            grad_sums=address(grad_sum_AF), grads=address(grads_BH),
            grad_hidden=address(grad_hidden_BF), grad_gate_up=address(grad_gate_up_BQ),
            grad_tokens=address(grad_tokens_NH), grad_probs=address(grad_probs_NA),
            of_gate_up=address(totals[0]), of_down=address(totals[1]), adding=adds,
            threads=threads(),
        )  # fmt: skip
        ends = [end for end, _ in blocks]
        library.experts_backward(
            ctypes.byref(given), len(ends), (ctypes.c_int64 * len(ends))(*ends)
        )
        return None, grad_tokens_NH, grad_probs_NA, grads[0], grads[1], None, None
