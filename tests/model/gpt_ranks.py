"""A tiny model with a padded vocabulary on the ranks of a layout; run in spawned processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.parallel.megatron_compat.prediction_losses import take_prediction_losses
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


def later_losses_by_hand() -> tuple[Tensor, Tensor]:
    """The losses of multi-token prediction of one microbatch, ``[depth]``: the model's, and as the
    definition says with its modules.
    """
    depth = 2
    overrides = [*_overrides(1, tied=False), f"model.mtp.depth={depth}"]
    trainer = build_trainer(overrides, data_fingerprint="random tokens")
    model, batch = trainer.chunks[0].module, random_batches(trainer)[0]
    tokens_BS, labels_BS, mask_BS = batch["tokens"], batch["labels"], batch["loss_mask"]
    mask_BS[0, -5:] = 0
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(tokens_BS, batch["position_ids"], None, labels=labels_BS, loss_mask=mask_BS)
    handle.remove()
    given = take_prediction_losses(depth)
    hidden_SBH, losses = seen[0], []
    angles = model.rotary_pos_emb(tokens_BS.shape[1])
    for number, layer in enumerate(model.mtp.layers, start=1):
        ahead_BS = torch.zeros_like(tokens_BS)
        ahead_BS[:, :-number] = tokens_BS[:, number:]
        token_SBH = model.embedding(ahead_BS, batch["position_ids"])
        both = torch.cat([layer.enorm(token_SBH), layer.hnorm(hidden_SBH)], dim=-1)
        (block,) = [module for name, module in layer.named_children() if "layer" in name
                    and hasattr(module, "self_attention")]  # fmt: skip
        with torch.no_grad():
            joined = both @ layer.eh_proj.weight.T
            out_SBH, _ = block(joined, attention_mask=None, rotary_pos_emb=angles)
            hidden_SBH = layer.final_layernorm(out_SBH)
            logits_BSV = (hidden_SBH @ model.output_layer.weight.T).transpose(0, 1)
        # Position i tells of the token 1 + number behind it, as far as there is one.
        told = logits_BSV[:, :-number, :VOCABULARY]
        wanted, counts = labels_BS[:, number:], mask_BS[:, number:]
        each = F.cross_entropy(told.transpose(1, 2), wanted, reduction="none")
        losses.append((each * counts).sum() / counts.sum())
    return given, torch.stack(losses)
