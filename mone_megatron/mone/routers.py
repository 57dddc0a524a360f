"""Gives megatron-core's router other assignments of tokens to experts (:mod:`.methods.routers`).

Logits, the z-loss, the balance losses and their logging are megatron-core's. The dispatchers take
any number of experts a token, but for flex, which ``config.validate`` refuses.

Shape suffixes: N tokens of this rank, A all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mone_megatron.methods.routers.expert_choice import expert_choice
from mone_megatron.methods.routers.top_p import top_p


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
