"""Gives megatron-core's router other assignments of tokens to experts (:mod:`.methods.routers`).

Logits, the z-loss, the balance losses and their logging are megatron-core's. The dispatchers take
any number of experts a token, but for flex, which ``config.validate`` refuses.

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from mone_megatron.methods.router import RoutedWeights, projection_rank
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.routers.expert_choice import expert_choice
from mone_megatron.methods.routers.relu import relu
from mone_megatron.methods.routers.routing_free import routing_free
from mone_megatron.methods.routers.top_p import top_p
from mone_megatron.mone.density import COEFFICIENT_START, DensityMeter
from mone_megatron.mone.layer_numbers import count_layers

# The name of steered routers' loss in megatron-core's tracker of auxiliary losses.
ROUTER_SPARSITY_LOSS = "router_sparsity_loss"


class AssigningRouter(TopKRouter):
    """Is a router whose assignment is a function of the logits."""

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weight of each expert for each token, ``[N, A]``; 0 is not chosen."""
        raise NotImplementedError

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the weights and which experts are chosen, each ``[N, A]``."""
        length, sequences = logits.shape[:2]
        logits_NA = self.apply_z_loss(logits.view(-1, self.config.num_moe_experts))
        probs_NA = self.assign(logits_NA)
        chosen_NA = probs_NA > 0
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            scores_NA = logits_NA.float().softmax(dim=-1)
            probs_NA = self._apply_aux_loss(probs_NA, scores_NA, chosen_NA)
            probs_NA = self._apply_seq_aux_loss(probs_NA, scores_NA, chosen_NA, length, sequences)
            probs_NA = self._apply_global_aux_loss(probs_NA, scores_NA, chosen_NA)
        return probs_NA, chosen_NA


class ExpertChoiceRouter(AssigningRouter):
    """Lets each expert choose among the tokens of this rank's microbatch."""

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weights of :func:`expert_choice`."""
        return expert_choice(logits_NA, self.topk)


class TopPRouter(AssigningRouter):
    """Takes the fewest experts that hold a share of a token's weights."""

    # Set where the layers are described (:mod:`mone_megatron.model.specs`).
    top_p: float

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weights of :func:`top_p`."""
        return top_p(logits_NA, self.top_p)


class SteeredRouter(AssigningRouter):
    """Leaves it open how many experts a token has, and has a loss with a steered coefficient."""

    # The name in the registry, whose entry has the loss.
    kind: str
    # Steered by `model.router.density` (:mod:`mone_megatron.train.hooks.density`).
    coefficient = COEFFICIENT_START
    # The layer's number where megatron-core's is not (multi-token prediction, in some releases).
    told_number: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Builds the router; its meter counts chosen pairs of token and expert."""
        super().__init__(*args, **kwargs)
        self.meter = DensityMeter()

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the weights with the loss attached, and which experts are chosen."""
        weights_NA, chosen_NA = super().routing(logits, *args, **kwargs)
        if not (self.training and torch.is_grad_enabled()):
            return weights_NA, chosen_NA
        self.meter.add(chosen_NA)
        tokens_A, _, tokens = get_tokens_per_expert_and_token_count(
            chosen_NA, self.tp_cp_group, self.topk
        )
        function = ROUTERS[self.kind].loss
        assert function is not None, "a steered router has a loss"
        loss = function(RoutedWeights(weights_NA, tokens_A, tokens, self.topk))
        number = self.layer_number if self.told_number is None else self.told_number
        save_to_aux_losses_tracker(ROUTER_SPARSITY_LOSS, loss, number, count_layers(self.config))
        attached = MoEAuxLossAutoScaler.apply(weights_NA, loss * self.coefficient)
        return cast(Tensor, attached), chosen_NA


class ReLURouter(SteeredRouter):
    """Takes the experts with a logit above 0."""

    kind = "relu"

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weights of :func:`relu`."""
        return relu(logits_NA)


class ProjectedRouter(TopKRouter):
    """Has a projection of low rank for each expert, whose norm is its logit."""

    # Set where the layers are described; 0 takes a quarter of the hidden size.
    rank: int

    def reset_parameters(self) -> None:
        """Gives the weight ``rank`` rows for each expert, one expert's behind another's."""
        rows = self.num_experts * projection_rank(self.rank, self.config.hidden_size)
        self.weight = nn.Parameter(torch.empty(rows, self.config.hidden_size))
        super().reset_parameters()

    def gating(self, input: Tensor) -> Tensor:
        """Returns the norm of each expert's projection of each token, ``[..., A]``."""
        projected = super().gating(input)
        return torch.linalg.vector_norm(projected.unflatten(-1, (self.num_experts, -1)), dim=-1)


class AutonomyRouter(ProjectedRouter):
    """Is megatron-core's router by norms instead of logits."""


class ScoreScale(nn.Module):
    """Holds the factor of each expert's norm. Its weights begin as those of a norm do, at 1."""

    def __init__(self, experts: int, dtype: torch.dtype) -> None:
        """Allocates a factor for each expert."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, dtype=dtype))


class RoutingFreeRouter(SteeredRouter, ProjectedRouter):
    """Takes the experts whose own score reaches a threshold."""

    kind = "routing_free"
    threshold: float

    def reset_parameters(self) -> None:
        """Draws the projections, and begins with norms as they are."""
        super().reset_parameters()
        dtype = self.config.params_dtype
        self.score_norm = ScoreScale(self.num_experts, dtype)
        self.score_bias = nn.Parameter(torch.zeros(self.num_experts, dtype=dtype))
        for parameter in (self.score_norm.weight, self.score_bias):
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def gating(self, input: Tensor) -> Tensor:
        """Returns the scores, ``[..., A]``."""
        norms = super().gating(input)
        return norms * self.score_norm.weight.to(norms.dtype) - self.score_bias.to(norms.dtype)

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weights of :func:`routing_free`."""
        return routing_free(logits_NA, self.threshold)
