"""Reads and clears the auxiliary losses that megatron-core's layers have left in a global."""

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
