"""megatron-core's GPTModel with a loss over the true vocabulary.

Shape suffixes: S sequence, B batch, V vocabulary entries of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


class LanguageModel(GPTModel):
    """A GPTModel whose vocabulary is padded, and whose loss does not see the padding.

    The padded columns stand for no token, and an exported model has none of them: with them in
    the softmax its loss would be another one.
    """

    def __init__(self, *, true_vocab_size: int, **kwargs: Any) -> None:
        """As GPTModel, plus the size of the vocabulary without padding."""
        super().__init__(**kwargs)
        self.true_vocab_size = true_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy over the true vocabulary, ``[B, S]``.

        Args:
            labels: ``[B, S]``.
            logits: ``[S, B, V]``, the columns of this tensor-parallel rank.
        """
        columns = logits.shape[-1]
        first = self.true_vocab_size - self.pg_collection.tp.rank() * columns
        if first < columns:
            # In place on a few columns: a copy of all logits would be large. Their gradient is 0.
            logits[..., max(0, first) :] = torch.finfo(logits.dtype).min
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss
