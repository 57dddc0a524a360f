"""Reads and clears the losses of multi-token prediction that megatron-core keeps in a global."""

from __future__ import annotations

import torch


def take_prediction_losses(depth: int) -> torch.Tensor:
    """Returns the losses of multi-token prediction of this rank, and sets them to zero.

    They are sums over the microbatches since the last call, of their means over tokens.

    Args:
        depth: how many there are on the ranks that have any.

    Returns:
        ``[depth]`` fp32; zeros on the ranks of other pipeline stages.
    """
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tracker = MTPLossLoggingHelper.tracker
    # Called otherwise from 0.17 on, which also counts tokens.
    kept = tracker.get("loss_values", tracker.get("values"))
    if kept is None:
        return torch.zeros(depth)
    taken: torch.Tensor = kept.float().clone()
    kept.zero_()
    return taken


def forget_prediction_losses() -> None:
    """Drops the losses of multi-token prediction of another model."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
