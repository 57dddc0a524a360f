"""Applies the sparsity loss to the hidden values of routed experts, of MoE and MoNE alike.

The loss itself is a method (:mod:`mone_megatron.methods.sparsity_losses`): a function of sums of
absolute hidden values over the tokens of an expert. It is attached to the hidden values, so that it
backpropagates with them, like megatron-core's own auxiliary losses.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments (one expert's
tokens of one microbatch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
)
from torch import Tensor

from mone_megatron.kernels.reference import segment_matrix
from mone_megatron.methods.sparsity_loss import HiddenSums
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES

# The loss's name in megatron-core's tracker of auxiliary losses.
SPARSITY_LOSS = "expert_sparsity_loss"


@dataclass(frozen=True)
class Sparsity:
    """Holds the settings of the loss.

    Attributes:
        kind: ``model.sparsity_loss``.
        coeff: ``model.sparsity_coeff``; with 0 the loss is logged and changes nothing.
        tokens: tokens of one microbatch over all ranks.
    """

    kind: str
    coeff: float
    tokens: int

    def attach(
        self,
        hidden_TF: Tensor,
        index_T: Tensor,
        *,
        num_segments: int,
        num_experts: int,
        layer_number: int | None,
        num_layers: int,
    ) -> Tensor:
        """Logs the loss, and returns the hidden values with its gradient attached.

        Args:
            hidden_TF: act(gate) * up at kept neurons and 0 elsewhere.
            index_T: int64, the segment of each row.
            num_segments: S, the number of segments.
            num_experts: experts of the layer over all ranks.
            layer_number: the number of the layer, from 1.
            num_layers: the number of layers of the model, those of multi-token prediction too.
        """
        function = SPARSITY_LOSSES[self.kind].function
        assert function is not None, "without a loss nothing is attached"
        with torch.set_grad_enabled(self.coeff > 0):
            abs_sum_SF = segment_matrix(index_T, num_segments) @ hidden_TF.abs().float()
            loss = function(HiddenSums(abs_sum_SF, self.tokens, num_experts))
        save_to_aux_losses_tracker(SPARSITY_LOSS, loss, layer_number, num_layers)
        if self.coeff > 0:
            hidden_TF = MoEAuxLossAutoScaler.apply(hidden_TF, loss * self.coeff)
        return hidden_TF
