"""Is megatron-core's router of the k largest logits, in one pass on CPU where all of it is usual.

The logits, the logging of losses and how gradients reach them are megatron-core's; so is all
routing on GPUs, in other precisions, or with settings that one pass does not know
(:mod:`mone_megatron.kernels.router_cpu`).

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mone_megatron.kernels.router_cpu import Routing, route, supports


class ShorterTopKRouter(TopKRouter):
    """Is megatron-core's router, with a shorter way from logits to weights."""

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the weights and which experts are chosen, each ``[N, A]``.

        Args:
            logits: ``[S, B, A]``.
            args: megatron-core's other arguments, none for the shorter way.
            kwargs: likewise.
        """
        if not args and not any(value is not None for value in kwargs.values()) and self._usual():
            logits_NA = logits.view(-1, self.config.num_moe_experts)
            routing = self._routing()
            if supports(logits_NA, routing):
                return self._routed(logits_NA, routing)
        routed: tuple[Tensor, Tensor] = super().routing(logits, *args, **kwargs)
        return routed

    def _usual(self) -> bool:
        """Returns whether one pass does all that megatron-core would do by its settings."""
        config = self.config
        return bool(
            self.score_function == "softmax"
            and self.routing_type in ("none", "aux_loss")
            and not self.enable_expert_bias
            and self.router_replay is None
            and not config.moe_router_group_topk
            and not config.moe_router_fusion
            and config.moe_expert_capacity_factor is None
        )

    def _routing(self) -> Routing:
        config, ranks = self.config, self.tp_cp_group.size()
        with_losses = self.training and torch.is_grad_enabled()
        return Routing(
            experts_per_token=self.topk,
            of_all=config.moe_router_pre_softmax,
            scaling=config.moe_router_topk_scaling_factor or 1.0,
            z_coeff=(config.moe_z_loss_coeff or 0.0) / ranks if with_losses else 0.0,
            balance_coeff=self.get_aux_loss_coeff("aux_loss") if with_losses else 0.0,
            ranks=ranks,
        )

    def _routed(self, logits_NA: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        exchange = self._over_ranks if routing.ranks > 1 and routing.balance_coeff else None
        weights_NA, chosen_NA, z_loss, balance_loss = route(logits_NA, routing, exchange)
        attach = self.attach_and_log_load_balancing_loss
        if routing.z_coeff:
            weights_NA = attach(weights_NA, routing.z_coeff, z_loss, "z_loss", None)
        if routing.balance_coeff:
            weights_NA = attach(
                weights_NA, routing.balance_coeff, balance_loss, "load_balancing_loss",
                self.tp_cp_group,
            )  # fmt: skip
        return weights_NA, chosen_NA

    def _over_ranks(self, counts_A: Tensor) -> Tensor:
        dist.all_reduce(counts_A, group=self.tp_cp_group)
        return counts_A
