"""Losses of multi-token prediction: how well later tokens are told, beside the next one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record, StepReport
from mone_megatron.parallel.megatron_compat.prediction_losses import take_prediction_losses


class PredictionLossHook(Hook):
    """Records the losses of the layers of multi-token prediction, without their coefficient.

    megatron-core keeps them in a process-wide global that the ranks of the last pipeline stage
    fill. They ride along in the step's one collective.
    """

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        """Notes how many there are.

        Args:
            config: validated.
            layout: from validation.
            device: where the step's collective is.
        """
        self.depth = config.model.mtp.depth
        self.device = device
        # Every tensor-parallel rank of the last stage has the same mean of each microbatch.
        self.copies = layout.data * layout.num_microbatches * config.parallel.tensor

    def reduce(self) -> Mapping[str, Tensor]:
        """Returns this rank's share of each loss ``[depth]``, and starts counting anew."""
        return {"losses": take_prediction_losses(self.depth).to(self.device) / self.copies}

    def record(self, report: StepReport) -> Record:
        """Returns the mean loss, and with several depths each one's."""
        losses = report.sums["losses"].tolist()
        record: Record = {"mtp/loss": sum(losses) / len(losses)}
        if len(losses) > 1:
            record |= {f"mtp/loss/depth_{i + 1}": loss for i, loss in enumerate(losses)}
        return record
