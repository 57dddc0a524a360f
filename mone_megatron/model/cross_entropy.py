"""Computes cross-entropy over a vocabulary that is spread over ranks, a few rows at a time.

Logits are the largest activation of a model with a large vocabulary. megatron-core's loss makes a
copy of them in fp32, which lives until the backward pass. Here fp32 exists for a block of rows:
one number a row is kept, and the gradient is written where the logits are.

Shape suffixes: T tokens, V vocabulary entries of this rank, B the rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled, threads

# Elements of a block: in a core's cache, or large enough to fill a GPU and small beside its memory.
_ON_CPU, _ON_GPU = 2**18, 2**25


def vocab_parallel_cross_entropy(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    first: int,
    valid: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Returns ``-log softmax(logits)[target]`` of each token, ``[T]`` in fp32.

    Equal to ``F.cross_entropy`` in fp32 up to rounding. The backward pass overwrites the logits
    with their gradient, so it can run once. Logits in fp32 of which a gradient is wanted are
    overwritten at once, with their exponentials, which are then computed once instead of twice.

    Args:
        logits_TV: contiguous logits of any floating dtype.
        target_T: int64, entries of the whole vocabulary.
        first: the vocabulary entry of this rank's first column.
        valid: columns that stand for an entry; those after them are padding, without influence and
            with a gradient of 0.
        group: the ranks that hold the other entries; None for none.
    """
    losses_T: Tensor = _CrossEntropy.apply(logits_TV, target_T, first, valid, group)
    return losses_T


def _blocks(logits_TV: Tensor) -> Iterator[slice]:
    rows, columns = logits_TV.shape
    elements = _ON_GPU if logits_TV.is_cuda else _ON_CPU * torch.get_num_threads()
    step = max(1, elements // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits_TV: Tensor,
        target_T: Tensor,
        first: int,
        valid: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        rows = len(logits_TV)
        here_T = (target_T >= first) & (target_T < first + valid)
        column_T = (target_T - first).masked_fill_(~here_T, 0)
        log_sum_T = torch.full((rows,), -torch.inf, device=logits_TV.device)
        chosen_T = torch.zeros(rows, device=logits_TV.device)
        # Exponentials are worth keeping where they lose nothing to rounding.
        in_place = logits_TV.dtype is torch.float32 and ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        logits_TV = logits_TV.detach()
        largest_T = None
        if valid > 0:
            chosen_T = logits_TV.gather(-1, column_T.unsqueeze(-1)).squeeze(-1).float() * here_T
            if in_place:
                largest_T = _exponentials(logits_TV[:, :valid], log_sum_T)
            elif not _compiled(
                logits_TV[:, :valid], torch.empty_like(log_sum_T), log_sum_T, overwriting=False
            ):
                for block in _blocks(logits_TV):
                    torch.logsumexp(logits_TV[block, :valid].float(), dim=-1, out=log_sum_T[block])
        if group is not None:
            # log of a sum of exponentials over ranks, by their largest.
            most_T = log_sum_T.clone()
            dist.all_reduce(most_T, op=dist.ReduceOp.MAX, group=group)
            both_2T = torch.stack([(log_sum_T - most_T).exp_(), chosen_T])
            dist.all_reduce(both_2T, group=group)
            log_sum_T, chosen_T = most_T + both_2T[0].log(), both_2T[1]
        # The share of an entry is exp(logit - log_sum), or exp(logit - largest) times a number.
        of_row_T = log_sum_T if largest_T is None else (largest_T - log_sum_T).exp_()
        ctx.save_for_backward(logits_TV, of_row_T, column_T, here_T)
        ctx.valid = valid  # type: ignore[attr-defined]
        ctx.in_place = largest_T is not None  # type: ignore[attr-defined]
        return log_sum_T - chosen_T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_T: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits_TV, of_row_T, column_T, here_T = ctx.saved_tensors  # type: ignore[attr-defined]
        valid: int = ctx.valid  # type: ignore[attr-defined]
        logits_TV = logits_TV.detach()
        column_T1 = column_T.unsqueeze(-1)
        if ctx.in_place:  # type: ignore[attr-defined]
            logits_TV[:, :valid].mul_((of_row_T * grad_T).unsqueeze(-1))
            logits_TV.scatter_add_(-1, column_T1, (grad_T * here_T).neg_().unsqueeze(-1))
        elif valid > 0:
            for block in _blocks(logits_TV):
                logits_BV = logits_TV[block, :valid]
                grad_BV = logits_BV.float().sub_(of_row_T[block].unsqueeze(-1)).exp_()
                less_B1 = here_T[block].unsqueeze(-1).float().neg_()
                grad_BV.scatter_add_(-1, column_T1[block], less_B1)
                logits_BV.copy_(grad_BV.mul_(grad_T[block].unsqueeze(-1)))
        logits_TV[:, valid:] = 0
        return logits_TV, None, None, None, None


def _exponentials(logits_TV: Tensor, log_sum_T: Tensor) -> Tensor:
    """Overwrites logits with ``exp(logit - largest of the row)``, and returns the largest, ``[T]``.

    The log of each row's sum of exponentials is written into ``log_sum_T``.
    """
    largest_T = torch.empty_like(log_sum_T)
    if _compiled(logits_TV, largest_T, log_sum_T, overwriting=True):
        return largest_T
    for block in _blocks(logits_TV):
        logits_BV, largest_B = logits_TV[block], largest_T[block]
        torch.amax(logits_BV, dim=-1, out=largest_B)
        # As torch.logsumexp: an infinity less itself is no number.
        largest_B.masked_fill_(largest_B.isinf(), 0.0)
        logits_BV.sub_(largest_B.unsqueeze(-1)).exp_()
        torch.sum(logits_BV, dim=-1, out=log_sum_T[block])
    log_sum_T.log_().add_(largest_T)
    return largest_T


def _compiled(
    logits_TV: Tensor, largest_T: Tensor, log_sum_T: Tensor, *, overwriting: bool
) -> bool:
    """Does :func:`_exponentials` in one pass, and leaves the logits alone if they are to stay.

    Returns:
        Whether it did: there is a compiled function, and it knows such logits.
    """
    if logits_TV.is_cuda or logits_TV.dtype is not torch.float32:
        return False
    library = compiled().library
    if library is None:
        return False
    room = None if overwriting else torch.empty(threads(), logits_TV.shape[1])
    library.cross_entropy_forward(
        *logits_TV.shape, logits_TV.stride(0), address(logits_TV), address(room),
        address(largest_T), address(log_sum_T), threads(),
    )  # fmt: skip
    return True
