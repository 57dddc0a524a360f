"""Computes causal attention on CPU in fp32 by batched matrix products over blocks of queries.

torch's flash attention computes all weights again in the backward pass, so that it need not keep
them. For short sequences that takes longer than reading them back: here they are kept, those of a
block of queries up to the block's last key (:mod:`.attention_blocks`). The heads that share a key
are rows of one product. Outputs and gradients are equal to torch's up to rounding.

Shape suffixes: S sequence, B batch, N query heads, G key/value heads, R query heads a key/value
head, D head dimension; M = B x G; Q queries of a block, C = R x Q rows of its product, K keys up to
the end of the block.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.attention_blocks import (
    QUERIES,
    blocks,
    keeps_weights,
    weights_of_head,
)
from mone_megatron.kernels.compiled_cpu import (
    HeadsArguments,
    address,
    compiled_products,
    threads,
    with_rows,
)
from mone_megatron.kernels.rotary_cpu import cosines_and_sines


def supports(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> bool:
    """Returns whether :func:`causal_attention` is to be used: fp32 on a CPU, short sequences,
    values as wide as keys.
    """
    tensors = query_SBND, key_SBGD, value_SBGD
    return (
        all(tensor.dtype is torch.float32 and not tensor.is_cuda for tensor in tensors)
        and key_SBGD.shape == value_SBGD.shape
        and len(query_SBND) == len(key_SBGD)
        and keeps_weights(len(query_SBND))
    )


def causal_attention(
    query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, scale: float
) -> Tensor:
    """Returns the attention of each query to the keys up to its own, ``[S, B, N * D]``.

    Args:
        query_SBND: fp32 queries; N is a multiple of G.
        key_SBGD: fp32 keys.
        value_SBGD: fp32 values.
        scale: multiplies scores.
    """
    context: Tensor
    if functions := compiled_products():
        context = _CompiledAttention.apply(*functions, query_SBND, key_SBGD, value_SBGD, scale)
    else:
        context = _CausalAttention.apply(query_SBND, key_SBGD, value_SBGD, scale)
    return context


class _CompiledAttention(torch.autograd.Function):
    """Does the same by compiled functions, of which each head's block stays in the cache."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        library: Any,
        product: int,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        scale: float,
    ) -> Tensor:
        length, batch, heads, width = query_SBND.shape
        groups, count = key_SBGD.shape[2], threads()
        per_key = heads // groups
        operands = tuple(with_rows(x) for x in (query_SBND, key_SBGD, value_SBGD))
        keeps = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        kept = heads * batch * weights_of_head(length)
        weights = torch.empty(kept if keeps else count * per_key * QUERIES * length)
        room = torch.empty(count * per_key * QUERIES * width)
        context_SBND = torch.empty(query_SBND.shape)
        library.attention_forward(
            product, length, batch, groups, per_key, width, QUERIES, scale,
            *itertools.chain(*((address(x), *x.stride()[:-1]) for x in operands)),
            address(weights), keeps, address(room), address(context_SBND), count,
        )  # fmt: skip
        ctx.save_for_backward(*operands, weights)
        ctx.others = library, product, scale  # type: ignore[attr-defined]
        return context_SBND.flatten(2)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_context: Tensor
    ) -> tuple[None, None, Tensor, Tensor, Tensor, None]:
        *operands, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        library, product, scale = ctx.others  # type: ignore[attr-defined]
        length, batch, groups, width = operands[1].shape
        per_key, count = operands[0].shape[2] // groups, threads()
        grad_context = grad_context.contiguous()
        grads = [torch.empty(x.shape) for x in operands]
        room = torch.empty(count * per_key * QUERIES * (3 * width + length))
        library.attention_backward(
            product, length, batch, groups, per_key, width, QUERIES, scale,
            *itertools.chain(*((address(x), *x.stride()[:-1]) for x in operands)),
            address(weights), address(grad_context), address(room), *map(address, grads), count,
        )  # fmt: skip
        return None, None, grads[0], grads[1], grads[2], None


@dataclass(frozen=True)
class Heads:
    """Says how heads are made of projections ``[S, B, G, (R + 2) * D]``: of each key/value head its
    queries, the key and the value.

    Attributes:
        per_key: R.
        query_eps: of the RMSNorm of queries.
        key_eps: of the RMSNorm of keys.
        scale: multiplies scores.
    """

    per_key: int
    query_eps: float
    key_eps: float
    scale: float


def makes_heads(
    hidden_SBH: Tensor, query_weight_D: Tensor, key_weight_D: Tensor, angles: Tensor
) -> bool:
    """Returns whether :func:`attention_of_projections` is to be used: where there is a compiler,
    fp32 on a CPU, short sequences, one angle for each position and value of a head.

    Args:
        hidden_SBH: what the projections are to be made of.
        query_weight_D: see :func:`attention_of_projections`.
        key_weight_D: likewise.
        angles: likewise.
    """
    tensors = hidden_SBH, query_weight_D, key_weight_D, angles
    length, width = len(hidden_SBH), len(query_weight_D)
    return (
        all(x.dtype is torch.float32 and not x.is_cuda for x in tensors)
        and keeps_weights(length)
        and angles.shape == (length, 1, 1, width)
        and not angles.requires_grad
        and compiled_products() is not None
    )


def attention_of_projections(
    mixed_SBP: Tensor,
    query_weight_D: Tensor,
    key_weight_D: Tensor,
    angles: Tensor,
    heads: Heads,
) -> Tensor:
    """Returns the causal attention of heads that are normalised and rotated, ``[S, B, N * D]``.

    Queries and keys are made where they are used, in a core's cache, and again in the backward
    pass: no tensor of them is ever written, nor of their gradients.

    Args:
        mixed_SBP: fp32 projections, see :class:`Heads`.
        query_weight_D: fp32, of the RMSNorm of queries.
        key_weight_D: fp32, of the RMSNorm of keys.
        angles: fp32, of each position and value, ``[S, 1, 1, D]``; the same tensor always holds the
            same angles.
        heads: how they are made.
    """
    functions = compiled_products()
    assert functions is not None, "asked where makes_heads says so"
    context: Tensor = _ProjectedAttention.apply(
        *functions, mixed_SBP, query_weight_D, key_weight_D, *cosines_and_sines(angles), heads
    )
    return context


def _given(
    product: int,
    tensors: Sequence[Tensor],
    sizes: Mapping[str, float],
    *,
    keeping: bool,
    **others: Tensor,
) -> HeadsArguments:
    """Returns what both passes of :class:`_ProjectedAttention` are given.

    Args:
        product: the address of the matrix product.
        tensors: projections, weights of both norms, cosines, sines, the rows' scales and weights.
        sizes: what is not a tensor, by name.
        keeping: whether the weights are kept.
        others: the tensors of one pass, by name; they must outlive the call.
    """
    names = ("mixed", "query_weight", "key_weight", "cos", "sin", "inverse", "weights")
    places = dict(zip(names, map(address, tensors), strict=True))
    places |= {name: address(tensor) for name, tensor in others.items()}
    return HeadsArguments(product=product, keeping=keeping, threads=threads(), **places, **sizes)


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        library: Any,
        product: int,
        mixed_SBP: Tensor,
        query_weight_D: Tensor,
        key_weight_D: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
    ) -> Tensor:
        mixed_SBP, cos, sin = mixed_SBP.contiguous(), cos.contiguous(), sin.contiguous()
        length, batch, width = *mixed_SBP.shape[:2], len(query_weight_D)
        per_key, count = heads.per_key, threads()
        groups = mixed_SBP.shape[2] // ((per_key + 2) * width)
        keeps = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        kept = batch * groups * per_key * weights_of_head(length)
        weights = torch.empty(kept if keeps else count * per_key * QUERIES * length)
        inverse = torch.empty(batch * groups * (per_key + 1) * length)
        room = torch.empty(count * (per_key * QUERIES + length) * width)
        context_SBD = torch.empty(length, batch, groups * per_key * width)
        sizes = dict(
            length=length, batch=batch, groups=groups, per_key=per_key, width=width, step=QUERIES,
            scale=heads.scale, query_eps=heads.query_eps, key_eps=heads.key_eps,
        )  # fmt: skip
        kept_tensors = mixed_SBP, query_weight_D, key_weight_D, cos, sin, inverse, weights
        given = _given(product, kept_tensors, sizes, room=room, context=context_SBD, keeping=keeps)
        library.attend_forward(ctypes.byref(given))
        ctx.save_for_backward(*kept_tensors)
        ctx.others = library, product, sizes  # type: ignore[attr-defined]
        return context_SBD

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_context: Tensor
    ) -> tuple[None, None, Tensor, Tensor, Tensor, None, None, None]:
        kept_tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        library, product, sizes = ctx.others  # type: ignore[attr-defined]
        grad_context = grad_context.contiguous()
        length, width, rows = sizes["length"], sizes["width"], sizes["per_key"] * QUERIES
        grad_mixed_SBP = torch.empty(kept_tensors[0].shape)
        parts_M2D = torch.empty(sizes["batch"] * sizes["groups"], 2, width)
        room = torch.empty(threads() * (rows * (3 * width + length) + 2 * length * width))
        given = _given(
            product, kept_tensors, sizes, room=room, grad=grad_context,
            grad_mixed=grad_mixed_SBP, parts=parts_M2D, keeping=True,
        )  # fmt: skip
        library.attend_backward(ctypes.byref(given))
        of_query, of_key = parts_M2D.sum(dim=0).unbind()
        return None, None, grad_mixed_SBP, of_query, of_key, None, None, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        scale: float,
    ) -> Tensor:
        length, batch, heads, width = query_SBND.shape
        key_MSD, value_MSD = _by_group(key_SBGD), _by_group(value_SBGD)
        matrices, rows = len(key_MSD), heads * batch // len(key_MSD)
        keeps = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        queries = torch.empty(query_SBND.numel())
        weights = torch.empty(heads * batch * weights_of_head(length) if keeps else 0)
        context_SBND = torch.empty(query_SBND.shape)
        places = _Places(batch, matrices // batch, rows, width)
        kept = _Blocks(queries, weights, length, matrices, rows, width)
        for block, (first, end) in enumerate(blocks(length)):
            query_MCD = kept.queries[block]
            places.of(query_MCD).copy_(places.rows(query_SBND[first:end]))
            sizes = matrices, rows * (end - first), end
            weight_MCK = kept.weights[block] if keeps else torch.empty(sizes)
            torch.baddbmm(
                weight_MCK,
                query_MCD,
                key_MSD[:, :end].transpose(1, 2),
                beta=0,
                alpha=scale,
                out=weight_MCK,
            )
            hidden_QQ = torch.full((end - first, end - first), -torch.inf).triu_(1)
            weight_MCK.view(matrices, rows, end - first, end)[..., first:].add_(hidden_QQ)
            torch.softmax(weight_MCK, dim=-1, out=weight_MCK)
            context_MCD = torch.bmm(weight_MCK, value_MSD[:, :end])
            places.rows(context_SBND[first:end]).copy_(places.of(context_MCD))
        ctx.save_for_backward(queries, weights, key_SBGD, value_SBGD)
        ctx.scale = scale  # type: ignore[attr-defined]
        return context_SBND.flatten(2)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, weights, key_SBGD, value_SBGD = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        key_MSD, value_MSD = _by_group(key_SBGD), _by_group(value_SBGD)
        length, batch, groups, width = key_SBGD.shape
        matrices, rows = batch * groups, grad_context.shape[2] // (groups * width)
        grad_SBND = grad_context.view(length, batch, groups * rows, width)
        grad_query_SBND = torch.empty(grad_SBND.shape)
        # The last block sees all keys and comes first: it writes what the others add to.
        grad_key_MSD, grad_value_MSD = torch.empty(2, matrices, length, width)
        places = _Places(batch, groups, rows, width)
        kept = _Blocks(queries, weights, length, matrices, rows, width)
        for block, (first, end) in reversed(list(enumerate(blocks(length)))):
            query_MCD, weight_MCK = kept.queries[block], kept.weights[block]
            grad_MCD = torch.empty(query_MCD.shape)
            places.of(grad_MCD).copy_(places.rows(grad_SBND[first:end]))
            _put(grad_value_MSD, weight_MCK, grad_MCD, 1.0, end)
            grad_MCK = torch.bmm(grad_MCD, value_MSD[:, :end].transpose(1, 2))
            torch._softmax_backward_data(
                grad_MCK, weight_MCK, -1, torch.float32, grad_input=grad_MCK
            )
            _put(grad_key_MSD, grad_MCK, query_MCD, scale, end)
            grad_query_MCD = torch.baddbmm(
                grad_MCD, grad_MCK, key_MSD[:, :end], beta=0, alpha=scale, out=grad_MCD
            )
            places.rows(grad_query_SBND[first:end]).copy_(places.of(grad_query_MCD))
        grad_key, grad_value = (
            grad.view(batch, groups, length, width).permute(2, 0, 1, 3)
            for grad in (grad_key_MSD, grad_value_MSD)
        )
        return grad_query_SBND, grad_key, grad_value, None


def _by_group(heads_SBGD: Tensor) -> Tensor:
    """Returns keys or values as one matrix for each sequence and head, a view where it can be."""
    return heads_SBGD.flatten(1, 2).transpose(0, 1)


def _put(total_MSD: Tensor, left_MCK: Tensor, right_MCD: Tensor, scale: float, end: int) -> None:
    """Adds a block's part to a gradient of keys or values; that of the last block is written."""
    sizes = len(total_MSD), end, total_MSD.shape[2]
    whole = end == total_MSD.shape[1]
    part_MKD = total_MSD if whole else torch.empty(sizes)
    # Into a slice a batched product would be one product for each matrix.
    torch.baddbmm(part_MKD, left_MCK.transpose(1, 2), right_MCD, beta=0, alpha=scale, out=part_MKD)
    if not whole:
        total_MSD[:, :end].add_(part_MKD)


class _Places:
    """Says where the rows of a block's products are in queries, outputs and their gradients."""

    def __init__(self, batch: int, groups: int, rows: int, width: int) -> None:
        self.sizes = batch, groups, rows, width

    def of(self, block_MCD: Tensor) -> Tensor:
        """Returns a block as ``[B, G, R, Q, D]``, as a view."""
        batch, groups, rows, width = self.sizes
        return block_MCD.view(batch, groups, rows, -1, width)

    def rows(self, part_QBND: Tensor) -> Tensor:
        """Returns some positions of all heads as ``[B, G, R, Q, D]``, as a view."""
        return part_QBND.unflatten(2, self.sizes[1:3]).permute(1, 2, 3, 0, 4)


class _Blocks:
    """Cuts what is kept of all blocks, of two tensors, into views of each."""

    def __init__(
        self,
        queries: Tensor,
        weights: Tensor,
        length: int,
        matrices: int,
        rows: int,
        width: int,
    ) -> None:
        ends = list(blocks(length))
        heads = matrices * rows
        parts = queries.split_with_sizes([heads * (end - first) * width for first, end in ends])
        self.queries = [part.view(matrices, -1, width) for part in parts]
        # None of them where none are kept.
        sizes = [heads * (end - first) * end for first, end in ends] if len(weights) else []
        self.weights = [
            part.view(matrices, -1, end)
            for part, (_, end) in zip(weights.split_with_sizes(sizes), ends, strict=bool(sizes))
        ]
