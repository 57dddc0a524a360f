"""Says what every contender of one comparison trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mone_megatron.config.schema import Config

# The contenders, as results name them.
MOE, MONE, PEER, PRODUCTS = "MoE", "MoNE", "transformers", "matrix products"

# transformers' ways to compute experts that train in fp32.
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

# A microbatch: tokens and the token after each, int64 ``[micro_batch, seq]``.
Arrays = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class PeerTask:
    """Holds a model, an optimizer and the microbatches of a few steps.

    Attributes:
        config: of one process, from :func:`mone_megatron.lab.benchmarks.ranks.prepare`.
        vocab_size: the tokenizer's, unpadded.
        steps: microbatches of each step, gone through over and over; none where the contender
            loads them by itself.
        experts: what computes the experts, for contenders that know several.
    """

    config: Config
    vocab_size: int
    steps: tuple[tuple[Arrays, ...], ...] = ()
    experts: str = ""

    @property
    def num_microbatches(self) -> int:
        """Returns how many microbatches a step has."""
        train = self.config.train
        return train.global_batch_size // train.micro_batch_size
