"""Reads, clears and scales the auxiliary losses of layers, which megatron-core keeps in globals."""

from __future__ import annotations

import torch


def forget_layer_losses() -> None:
    """Drops megatron-core's auxiliary losses, and the number of layers that they were made for.

    Until 0.17 ``moe_utils`` hands out the one dictionary of them; from 0.18 on it hands out a copy,
    and clearing that does nothing.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def layer_losses() -> dict[str, torch.Tensor]:
    """Returns megatron-core's auxiliary losses of this rank by name: ``[layers]``, no copies."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        metrics = moe_utils.get_moe_metrics_tracker().metrics
        return {name: entry.values for name, entry in metrics.items()}
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in tracker.items()}


def zero_layer_losses() -> None:
    """Sets megatron-core's auxiliary losses of this rank to zero, in place."""
    for values in layer_losses().values():
        values.zero_()


def scale_layer_losses(*, microbatches: int, context_ranks: int) -> None:
    """Sets what the gradients of auxiliary losses are multiplied by in the next backward passes.

    Schedules divide the loss of a microbatch by their number, and multiply it by the ranks that
    share its tokens, over which gradients are averaged. They do the same for the losses that
    layers attach to what they return, but in models with experts only; elsewhere such a loss
    would count once for each microbatch, and differently in each layout.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(context_ranks / microbatches))
