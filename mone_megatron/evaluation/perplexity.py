"""Measures the perplexity of a model on a corpus.

Shape suffixes: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mone_megatron.evaluation.corpora import Window
from mone_megatron.evaluation.estimates import Estimate, ratio

# Positions whose logits are turned into losses at once: a float32 copy of all would be large.
_POSITIONS = 1024


@dataclass(frozen=True)
class Perplexity:
    """Holds what a model makes of a corpus; one sample is one window.

    Attributes:
        loss: nats a token, the mean over all tokens.
        perplexity: e to the power of it.
        bits_per_byte: bits to encode a byte of the text; None where the tokenizer's spelling is
            not known or the tokens stand for no text.
        tokens: how many were predicted.
        text_bytes: bytes of text that they stand for; None likewise.
        windows: how many.
        fingerprint: SHA-256 of all windows; equal where two models read the same tokens.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    tokens: int
    text_bytes: int | None
    windows: int
    fingerprint: str


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel,
    windows: Sequence[Window],
    *,
    bytes_of_token: npt.NDArray[np.int64] | None,
    batch_size: int,
    max_tokens: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Predicts every token of every window but the first of each.

    Args:
        model: on its device, in evaluation mode.
        windows: each ``[L + 1]`` int64; the last may be shorter.
        bytes_of_token: ``[V]`` from :func:`.token_bytes.bytes_of_tokens`, or None.
        batch_size: windows in one forward pass.
        max_tokens: stop after the window with which so many are predicted; None for all.
        progress: is told how many tokens were done with each batch.
    """
    nats: list[float] = []
    tokens: list[int] = []
    text_bytes: list[int] = []
    digest = hashlib.sha256()
    for batch in batches(windows, batch_size, max_tokens):
        stacked = torch.from_numpy(np.stack(batch))
        losses_BS = _losses(model, stacked)
        nats += losses_BS.sum(dim=1, dtype=torch.float64).tolist()
        for window in batch:
            digest.update(np.int64(window.size).tobytes() + window.tobytes())
            tokens.append(window.size - 1)
            if bytes_of_token is not None:
                text_bytes.append(int(bytes_of_token[window[1:]].sum()))
        progress(sum(window.size - 1 for window in batch))
    total_bytes = sum(text_bytes) if bytes_of_token is not None else None
    bits = None
    if total_bytes:
        bits = ratio(nats, np.asarray(text_bytes), scale=1 / math.log(2))
    return Perplexity(
        loss=ratio(nats, np.asarray(tokens)),
        perplexity=ratio(nats, np.asarray(tokens), exponential=True),
        bits_per_byte=bits,
        tokens=sum(tokens),
        text_bytes=total_bytes,
        windows=len(tokens),
        fingerprint=digest.hexdigest(),
    )


def batches(
    windows: Sequence[Window], batch_size: int, max_tokens: int | None
) -> Iterator[list[Window]]:
    """Yields up to ``batch_size`` windows of one length together, in order."""
    batch: list[Window] = []
    tokens = 0
    for window in windows:
        if batch and (len(batch) == batch_size or window.size != batch[0].size):
            yield batch
            batch = []
        batch.append(window)
        tokens += window.size - 1
        if max_tokens is not None and tokens >= max_tokens:
            break
    if batch:
        yield batch


def _losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of windows ``[B, S + 1]`` in nats, float32 ``[B, S]``."""
    on_device = windows.to(model.device)
    # Without a mask, since nothing is padded: the models take their fast causal path.
    logits_BSV = model(input_ids=on_device[:, :-1], use_cache=False).logits
    rows, labels = logits_BSV.flatten(0, 1), on_device[:, 1:].flatten()
    losses = [
        F.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(rows.split(_POSITIONS), labels.split(_POSITIONS), strict=True)
    ]
    return torch.cat(losses).view(logits_BSV.shape[:2]).cpu()
