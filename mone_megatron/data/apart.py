"""Makes samples whose documents do not see one another: ``data.reset_attention``.

A sample of packed documents gets, beside its tokens, the number of each token's document and its
place in it. Attention reads the number (:class:`mone_megatron.model.attention.SDPAttention`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mone_megatron.data.loader import DOCUMENTS, SampleDataset


def document_numbers(tokens: Tensor, end_of_text: int) -> Tensor:
    """Returns the document of each token, from 0, int64 of the same shape.

    A document ends with its end-of-text, which still belongs to it.

    Args:
        tokens: ``[..., positions]``, int64.
        end_of_text: the token that ends a document.
    """
    ended = (tokens == end_of_text).long()
    return ended.cumsum(dim=-1) - ended


def places_in_documents(documents: Tensor) -> Tensor:
    """Returns how many tokens of its own document stand before each, int64 of the same shape.

    Args:
        documents: ``[positions]``, from :func:`document_numbers`.
    """
    at = torch.arange(documents.shape[-1])
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[1:] = documents[1:] != documents[:-1]
    return at - torch.where(begins, at, 0).cummax(dim=-1).values


class DocumentsApart:
    """Is a dataset whose samples say which document each of their tokens belongs to."""

    def __init__(self, samples: SampleDataset, end_of_text: int) -> None:
        """Wraps a dataset.

        Args:
            samples: the samples of packed documents.
            end_of_text: the token that ends each document.
        """
        self.samples = samples
        self.end_of_text = end_of_text

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        sample = self.samples[index]
        documents = document_numbers(sample["tokens"], self.end_of_text)
        return {
            **sample,
            DOCUMENTS: documents,
            "position_ids": places_in_documents(documents),
        }
