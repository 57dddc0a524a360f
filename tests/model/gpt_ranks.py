"""A tiny model with a padded vocabulary on the ranks of a layout; run in spawned processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.testing.trainer import VOCABULARY, build_trainer, random_batches

# Rows of the embedding; with two tensor-parallel ranks all of the padding is the second one's.
ROWS = 640


def _overrides(tensor: int, *, tied: bool) -> list[str]:
    return [
        "experiment=tiny_moe",
        "device=cpu",
        "model.num_layers=1",
        "train.seq_length=16",
        "model.vocab_padding_multiple=320",
        f"model.tie_embeddings={str(tied).lower()}",
        f"parallel.tensor={tensor}",
    ]


def train(tensor: int, tied: bool) -> tuple[list[float], Tensor, Tensor]:
    """Losses of three steps, and the rows of embedding and output layer that this rank holds."""
    trainer = build_trainer(_overrides(tensor, tied=tied), data_fingerprint="random tokens")
    losses = [trainer.stepper.train(random_batches(trainer)).loss for _ in range(3)]
    model = trainer.chunks[0].module
    embedding = model.embedding.word_embeddings.weight.detach().clone()
    return losses, embedding, embedding if tied else model.output_layer.weight.detach().clone()


def loss_by_hand() -> tuple[Tensor, Tensor]:
    """The model's loss of each token, and the cross-entropy of its logits, cut to their size."""
    trainer = build_trainer(_overrides(1, tied=False), data_fingerprint="random tokens")
    model, batch = trainer.chunks[0].module, random_batches(trainer)[0]
    with torch.no_grad():
        loss_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        logits_BSV = model(batch["tokens"], batch["position_ids"], None)
        assert logits_BSV.shape[-1] == ROWS
    cut = logits_BSV[..., :VOCABULARY].flatten(0, 1)
    return loss_BS.flatten(), F.cross_entropy(cut, batch["labels"].flatten(), reduction="none")
