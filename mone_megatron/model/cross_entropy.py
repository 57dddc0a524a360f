"""Computes cross-entropy over a vocabulary that is spread over ranks, a few rows at a time.

Logits are the largest activation of a model with a large vocabulary. megatron-core's loss makes a
copy of them in fp32, which lives until the backward pass. Here fp32 exists for a block of rows:
one number a row is kept, and the backward pass writes the gradient where the logits are.

Shape suffixes: T tokens, V vocabulary entries of this rank, B the rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

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
    with their gradient, so it can run once.

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
        if valid > 0:
            for block in _blocks(logits_TV):
                torch.logsumexp(logits_TV[block, :valid].float(), dim=-1, out=log_sum_T[block])
            chosen_T = logits_TV.gather(-1, column_T.unsqueeze(-1)).squeeze(-1).float() * here_T
        if group is not None:
            # log of a sum of exponentials over ranks, by their largest.
            largest_T = log_sum_T.clone()
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
            both_2T = torch.stack([(log_sum_T - largest_T).exp_(), chosen_T])
            dist.all_reduce(both_2T, group=group)
            log_sum_T, chosen_T = largest_T + both_2T[0].log(), both_2T[1]
        ctx.save_for_backward(logits_TV, log_sum_T, column_T, here_T)
        ctx.valid = valid  # type: ignore[attr-defined]
        return log_sum_T - chosen_T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_T: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits_TV, log_sum_T, column_T, here_T = ctx.saved_tensors  # type: ignore[attr-defined]
        valid: int = ctx.valid  # type: ignore[attr-defined]
        logits_TV = logits_TV.detach()
        for block in _blocks(logits_TV):
            logits_BV = logits_TV[block, :valid]
            # In place where the logits are fp32 already.
            grad_BV = logits_BV.float().sub_(log_sum_T[block].unsqueeze(-1)).exp_()
            if valid > 0:
                less_B1 = here_T[block].unsqueeze(-1).float().neg_()
                grad_BV.scatter_add_(-1, column_T[block].unsqueeze(-1), less_B1)
            grad_BV.mul_(grad_T[block].unsqueeze(-1))
            if grad_BV.data_ptr() != logits_BV.data_ptr():
                logits_BV.copy_(grad_BV)
        logits_TV[:, valid:] = 0
        return logits_TV, None, None, None, None
