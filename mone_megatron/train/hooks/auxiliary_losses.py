"""Auxiliary losses of a step: those of routers, sparsity, and the balance of neurons.

Shape suffixes: A auxiliary losses, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS
from mone_megatron.mone.routers import ROUTER_SPARSITY_LOSS
from mone_megatron.mone.sparsity import SPARSITY_LOSS
from mone_megatron.parallel.megatron_compat.auxiliary_losses import layer_losses, zero_layer_losses
from mone_megatron.train.hooks.due import is_due

# Our key -> megatron-core's name of each auxiliary loss.
_ROUTER_LOSSES = {
    "aux_loss": ("router/load_balancing_loss", "load_balancing_loss"),
    "seq_aux_loss": ("router/seq_load_balancing_loss", "seq_load_balancing_loss"),
    "global_aux_loss": ("router/global_load_balancing_loss", "global_load_balancing_loss"),
}
_Z_LOSS = "z_loss"


class AuxiliaryLossHook(Hook):
    """Records megatron-core's tracker of per-layer losses, without their coefficients.

    The tracker is a process-wide global that each rank fills with its own layers and tokens. A
    step's true value is a sum over all ranks with the weight of each kind of loss, which rides
    along in the step's one collective.
    """

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        """Lists the losses that this configuration computes.

        Args:
            config: validated.
            layout: from validation.
            device: where the step's collective is.
        """
        self.device = device
        self.interval, self.last = config.logging.layer_interval, config.train.steps
        self.num_layers = config.model.num_layers + config.model.mtp.depth
        per_stage = layout.data * layout.num_microbatches
        token_shards = config.parallel.tensor * config.parallel.context
        # (our key, tracker's name, weight of one rank's value)
        self.losses: list[tuple[str, str, float]] = []
        if config.model.num_experts:
            for kind, coeff in zip(
                config.model.router.balance, config.model.router.balance_coeff, strict=True
            ):
                if kind in _ROUTER_LOSSES and coeff > 0:
                    key, name = _ROUTER_LOSSES[kind]
                    # Ranks hold parts of a sum over a microbatch, or over the global batch.
                    count = layout.num_microbatches if kind == "global_aux_loss" else per_stage
                    self.losses.append((key, name, 1 / count))
            if ROUTERS[config.model.router.kind].loss is not None:
                # Ranks hold parts of a sum over a microbatch.
                self.losses.append(("router/sparsity_loss", ROUTER_SPARSITY_LOSS, 1 / per_stage))
            if config.model.router.z_loss_coeff > 0:
                # Ranks hold means over their tokens.
                self.losses.append(("router/z_loss", _Z_LOSS, 1 / (per_stage * token_shards)))
        if config.model.num_experts and SPARSITY_LOSSES[config.model.sparsity_loss].function:
            self.losses.append(("experts/sparsity_loss", SPARSITY_LOSS, 1 / per_stage))
        if config.mone.enabled:
            self.losses.append(("mone/balance_loss", NEURON_BALANCE_LOSS, 1 / per_stage))

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns this rank's weighted values ``[A, L]``, and starts counting anew."""
        tracked = layer_losses()
        values_AL = torch.zeros(len(self.losses), self.num_layers, device=self.device)
        for row, (_, name, weight) in enumerate(self.losses):
            if name in tracked:
                values_AL[row] = tracked[name].float() * weight
        zero_layer_losses()
        return {"losses": values_AL}

    def record(self, report: StepReport) -> Record:
        """Returns each loss's mean over the layers that compute it.

        On the steps that look at layers (``logging.layer_interval``) each layer's value, too.
        """
        record: Record = {}
        per_layer = is_due(report.step, self.interval, self.last)
        for (key, _, _), values_L in zip(self.losses, report.sums["losses"], strict=True):
            used = [i for i, value in enumerate(values_L.tolist()) if value != 0.0]
            if not used:
                continue
            record[key] = float(values_L[used].mean())
            if per_layer:
                record |= {f"{key}/layer_{i + 1}": float(values_L[i]) for i in used}
        return record
