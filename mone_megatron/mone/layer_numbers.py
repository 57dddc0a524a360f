"""Numbers the layers that losses are told of: those of multi-token prediction after the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def count_layers(config: TransformerConfig) -> int:
    """Returns how many layers a model has, those of multi-token prediction too."""
    return config.num_layers + (config.mtp_num_layers or 0)
