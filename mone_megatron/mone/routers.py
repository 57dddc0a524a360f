"""Computes the routers of the registry with megatron-core's (:mod:`.methods.routers`).

The z-loss, the balance losses and their logging are megatron-core's. The dispatchers take any
number of experts a token, but for flex, which ``config.validate`` refuses.

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    router_gating_linear,
    save_to_aux_losses_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from mone_megatron.methods.router import (
    RoutedWeights,
    Router,
    RouterSettings,
    RouterWeight,
    hold_weight,
)
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.mone.density import COEFFICIENT_START, DensityMeter
from mone_megatron.mone.layer_numbers import count_layers

# The name of steered routers' loss in megatron-core's tracker of auxiliary losses.
ROUTER_SPARSITY_LOSS = "router_sparsity_loss"
_PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


class MethodRouter(TopKRouter):
    """Is megatron-core's router with the weights and the logits of a method."""

    # Set where the layers are described (:mod:`mone_megatron.model.specs`).
    kind: str
    settings: RouterSettings

    @property
    def method(self) -> Router:
        """Returns the method, which ``model.router.kind`` names."""
        return ROUTERS[self.kind]

    @cached_property
    def method_weights(self) -> Mapping[str, RouterWeight]:
        """Returns what the method says of each weight, by its name here."""
        return self.method.weights(self.settings)

    def reset_parameters(self) -> None:
        """Makes the weights; what they begin with is :mod:`mone_megatron.model.initialize`'s."""
        wanted = dict(self.method_weights)
        first = torch.empty(wanted.pop("weight").shape, dtype=torch.float32)
        self.weight = nn.Parameter(first)
        super().reset_parameters()
        for name, weight in wanted.items():
            parameter = nn.Parameter(
                torch.full(weight.shape, weight.initial or 0.0, dtype=self.config.params_dtype)
            )
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
            hold_weight(self, name, parameter)

    @property
    def held(self) -> Mapping[str, Tensor]:
        """Returns the weights, by the method's names."""
        return {name: self.get_parameter(name) for name in self.method_weights}

    def gating(self, input: Tensor) -> Tensor:
        """Returns the method's logits, ``[..., A]``."""
        return self.method.logits(input, self.held, self._linear, self.settings)

    def _linear(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Returns tokens times a transposed matrix, in the precision of the router."""
        if weight is self.weight:
            return super().gating(tokens)
        precision = _PRECISIONS.get(self.config.moe_router_dtype or "", tokens.dtype)
        return cast(Tensor, router_gating_linear(tokens, weight, None, precision))


class AssigningRouter(MethodRouter):
    """Is a router whose assignment is a function of the logits."""

    def assign(self, logits_NA: Tensor) -> Tensor:
        """Returns the weight of each expert for each token, ``[N, A]``; 0 is not chosen."""
        assign = self.method.assign
        assert assign is not None, "such a router assigns"
        return assign(logits_NA, self.settings)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the weights and which experts are chosen, each ``[N, A]``."""
        probs_NA, chosen_NA = self.assigned(logits)
        if self.method.weigh is not None:
            probs_NA = self.method.weigh(probs_NA, self.held, self.settings)
        return probs_NA, chosen_NA

    def assigned(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the assigned weights with the losses attached, and which experts are chosen."""
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


class SteeredRouter(AssigningRouter):
    """Leaves it open how many experts a token has, and has a loss with a steered coefficient."""

    # Steered by `model.router.density` (:mod:`mone_megatron.train.hooks.density`).
    coefficient = COEFFICIENT_START
    # The layer's number where megatron-core's is not (multi-token prediction, in some releases).
    told_number: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Builds the router; its meter counts chosen pairs of token and expert."""
        super().__init__(*args, **kwargs)
        self.meter = DensityMeter()

    def assigned(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights with the loss attached, and which experts are chosen."""
        weights_NA, chosen_NA = super().assigned(logits)
        if not (self.training and torch.is_grad_enabled()):
            return weights_NA, chosen_NA
        self.meter.add(chosen_NA)
        tokens_A, _, tokens = get_tokens_per_expert_and_token_count(
            chosen_NA, self.tp_cp_group, self.topk
        )
        function = self.method.loss
        assert function is not None, "a steered router has a loss"
        loss = function(RoutedWeights(weights_NA, tokens_A, tokens, self.topk, self.held))
        number = self.layer_number if self.told_number is None else self.told_number
        save_to_aux_losses_tracker(ROUTER_SPARSITY_LOSS, loss, number, count_layers(self.config))
        attached = MoEAuxLossAutoScaler.apply(weights_NA, loss * self.coefficient)
        return cast(Tensor, attached), chosen_NA
