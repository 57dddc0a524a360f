"""Chooses the experts of tokens, weighs them and computes a router's losses in one pass on CPU.

torch does so in some thirty operations, forward and backward, on matrices of a few scores a token:
their calls take longer than their work. Here a row is read once each way
(:mod:`.compiled_cpu`).

Shape suffixes: N tokens, A experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import RoutedArguments, address, compiled, threads
from mone_megatron.kernels.few_largest import MOST_LARGEST


@dataclass(frozen=True)
class Routing:
    """Says how tokens are routed.

    Attributes:
        experts_per_token: how many experts each token gets: those with the largest logits.
        of_all: whether their weights are a softmax over all experts, or over the chosen ones.
        scaling: what weights are multiplied by.
        z_coeff: the coefficient of the mean square of the log-sum-exp of a token's logits
            (ST-MoE, arXiv 2202.08906).
        balance_coeff: the coefficient of the balance loss (Switch Transformer, arXiv 2101.03961).
        ranks: how many ranks have as many tokens of the same microbatch each.
    """

    experts_per_token: int
    of_all: bool = False
    scaling: float = 1.0
    z_coeff: float = 0.0
    balance_coeff: float = 0.0
    ranks: int = 1


# Of the tokens of each expert on this rank, int64 [A]: those on all ranks that share a microbatch.
Exchange = Callable[[Tensor], Tensor]


def supports(logits_NA: Tensor, routing: Routing) -> bool:
    """Returns whether :func:`route` can: fp32 on a CPU, a C compiler and not too many experts."""
    return (
        logits_NA.dtype is torch.float32
        and logits_NA.device.type == "cpu"
        and len(logits_NA) > 0
        and routing.experts_per_token <= min(MOST_LARGEST, logits_NA.shape[1])
        and compiled().library is not None
    )


def route(
    logits_NA: Tensor, routing: Routing, exchange: Exchange | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the weights of the chosen experts, which these are, and two losses.

    Of equal logits the first is chosen.

    Args:
        logits_NA: those that :func:`supports` accepts.
        routing: how tokens are routed.
        exchange: is called once, for the balance loss of a microbatch that ranks share; None where
            this rank has all of it.

    Returns:
        fp32 ``[N, A]``, the weight of each chosen expert and 0 elsewhere; bool ``[N, A]``; the
        z-loss and the balance loss, with their coefficients, without dimensions. All but the second
        have gradients.
    """
    weights_NA, chosen_NA, z_loss, balance_loss = _Route.apply(logits_NA, routing, exchange)
    return weights_NA, chosen_NA, z_loss, balance_loss


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits_NA: Tensor,
        routing: Routing,
        exchange: Exchange | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, experts = logits_NA.shape
        logits_NA = logits_NA.contiguous()
        weights_NA, scores_NA = torch.empty(tokens, experts), torch.empty(tokens, experts)
        chosen_NA = torch.empty(tokens, experts, dtype=torch.bool)
        log_sum_N, counts_A = torch.empty(tokens), torch.zeros(experts)
        z_loss, balance_loss = torch.empty(()), torch.empty(())
        given = RoutedArguments(
            logits=address(logits_NA), scores=address(scores_NA), log_sum=address(log_sum_N),
            probs=address(weights_NA), chosen=address(chosen_NA), counts=address(counts_A),
            z_loss=address(z_loss), balance_loss=address(balance_loss), tokens=tokens,
            experts=experts, k=routing.experts_per_token, of_all=routing.of_all,
            threads=threads(), scaling=routing.scaling, z_factor=routing.z_coeff,
            # Of the share of tokens and the mean score of each expert, times their number.
            balance_factor=routing.balance_coeff * experts
            / (routing.experts_per_token * (tokens * routing.ranks) ** 2),
        )  # fmt: skip
        library = compiled().library
        library.route_forward(ctypes.byref(given))
        if exchange is not None:
            counts_A.copy_(exchange(counts_A.long()))
        library.route_losses(ctypes.byref(given))
        ctx.save_for_backward(scores_NA, log_sum_N, weights_NA, chosen_NA, counts_A)
        ctx.given = given  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(chosen_NA)
        ctx.set_materialize_grads(False)
        return weights_NA, chosen_NA, z_loss, balance_loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_NA: Tensor | None,
        _: None,
        grad_z_loss: Tensor | None,
        grad_balance_loss: Tensor | None,
    ) -> tuple[Tensor, None, None]:
        scores_NA, log_sum_N, weights_NA, chosen_NA, counts_A = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_NA = None if grad_NA is None else grad_NA.contiguous()
        grad_logits_NA = torch.empty(scores_NA.shape)
        given: Any = ctx.given  # type: ignore[attr-defined]
        given.scores, given.log_sum = address(scores_NA), address(log_sum_N)
        given.probs, given.chosen = address(weights_NA), address(chosen_NA)
        given.counts, given.grad_logits = address(counts_A), address(grad_logits_NA)
        given.grad_probs, given.grad_z_loss = address(grad_NA), address(grad_z_loss)
        given.grad_balance_loss = address(grad_balance_loss)
        compiled().library.route_backward(ctypes.byref(given))
        return grad_logits_NA, None, None
