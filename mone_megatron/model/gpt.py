"""Gives megatron-core's GPTModel a loss over the true vocabulary.

Shape suffixes: S sequence, B batch, V vocabulary entries of this rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mone_megatron.model.cross_entropy import vocab_parallel_cross_entropy


class LanguageModel(GPTModel):
    """Is a GPTModel whose vocabulary is padded, and whose loss does not see the padding.

    The padded columns stand for no token, and an exported model has none of them: with them in
    the softmax its loss would be another one.
    """

    def __init__(self, *, true_vocab_size: int, **kwargs: Any) -> None:
        """Builds a GPTModel, and keeps the size of the vocabulary without padding."""
        super().__init__(**kwargs)
        self.true_vocab_size = true_vocab_size
        if self.mtp_process:
            # megatron-core marks the first stage's embedding only, and multi-token prediction has
            # a copy of it on the last one: an optimizer that reads the mark must move both alike.
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Returns the cross-entropy over the true vocabulary, ``[B, S]`` in fp32.

        Args:
            labels: the next token at each place, ``[B, S]``.
            logits: ``[S, B, V]``, the columns of this tensor-parallel rank.
        """
        columns = logits.shape[-1]
        group = self.pg_collection.tp
        first = group.rank() * columns
        losses_T = vocab_parallel_cross_entropy(
            logits.flatten(0, 1),
            labels.transpose(0, 1).flatten(),
            first=first,
            valid=min(columns, max(0, self.true_vocab_size - first)),
            group=group if group.size() > 1 else None,
        )
        return losses_T.view(logits.shape[:2]).transpose(0, 1).contiguous()

    def _postprocess(self, **arguments: Any) -> Tensor:
        """Returns what megatron-core makes of the last layer's output, by its own arguments.

        Without labels those are the logits of the next token, which multi-token prediction has no
        part in; megatron-core 0.16 would look for labels all the same.
        """
        if arguments["labels"] is not None or not self.mtp_process:
            output: Tensor = super()._postprocess(**arguments)
            return output
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits_SBV, _ = self.output_layer(
            arguments["hidden_states"],
            weight=weight,
            runtime_gather_output=arguments["runtime_gather_output"],
        )
        logits_BSV: Tensor = logits_SBV.transpose(0, 1).contiguous()
        return logits_BSV
