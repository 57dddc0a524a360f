"""Measures a dense model's loss with neurons left out, by hooks alone: an independent check.

``python tests/real/hook_losses.py MODEL TEXT WINDOW SHARE`` prints JSON: the mean loss of a text's
tokens in windows, unpruned and with the share of each token's neurons left out by |a| and by WINA,
the share of negative activations, and of those that are close to SiLU's minimum. Nothing of
mone_megatron is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

# SiLU is nowhere lower.
MINIMUM = -0.2785


def windows(ids: list[int], length: int) -> list[list[int]]:
    """Returns stretches; each begins with the last token of the one before, the first with ids'."""
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


@torch.no_grad()
def mean_loss(model: Any, texts: list[list[int]]) -> float:
    """Returns nats a token."""
    total = count = 0.0
    for text in texts:
        logits = model(torch.tensor([text[:-1]])).logits[0].float()
        total += F.cross_entropy(logits, torch.tensor(text[1:]), reduction="sum").item()
        count += len(text) - 1
    return total / count


def prune(model: Any, share: float, score: str) -> list[Any]:
    """Leaves neurons out in every MLP, and returns the hooks."""
    gates: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        norm_F = layer.mlp.down_proj.weight.norm(dim=0)
        kept = round((1 - share) * len(norm_F))

        def remember(module: Any, given: Any, gate: Tensor, number: int = number) -> None:
            gates[number] = gate

        def leave_out(
            module: Any, given: Any, number: int = number, norm_F: Tensor = norm_F, k: int = kept
        ) -> tuple[Tensor]:
            hidden = given[0]
            scores = F.silu(gates[number]).abs() if score == "|a|" else hidden.abs() * norm_F
            order = scores.sort(dim=-1, descending=True, stable=True).indices
            mask = torch.zeros_like(hidden).scatter(-1, order[..., :k], 1.0)
            return (hidden * mask,)

        hooks.append(layer.mlp.gate_proj.register_forward_hook(remember))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(leave_out))
    return hooks


def count(model: Any, counts: dict[str, int]) -> list[Any]:
    """Counts activations by their values, and returns the hooks."""

    def see(module: Any, given: Any, gate: Tensor) -> None:
        activations = F.silu(gate)
        counts["all"] += activations.numel()
        counts["negative"] += int((activations < 0).sum())
        counts["near the minimum"] += int((activations < 0.8 * MINIMUM).sum())

    return [layer.mlp.gate_proj.register_forward_hook(see) for layer in model.model.layers]


def main() -> None:
    """Measures."""
    folder, text, length, share = sys.argv[1:5]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # A text follows the end of another, and has one.
    end = model.config.eos_token_id
    ids = [end, *tokenizer.encode(Path(text).read_text(encoding="utf-8")), end]
    texts = windows(ids, int(length))
    counts = {"all": 0, "negative": 0, "near the minimum": 0}
    hooks = count(model, counts)
    losses = {"unpruned": mean_loss(model, texts)}
    for hook in hooks:
        hook.remove()
    for score in ("|a|", "WINA"):
        hooks = prune(model, float(share), score)
        losses[score] = mean_loss(model, texts)
        for hook in hooks:
            hook.remove()
    shares = {name: counts[name] / counts["all"] for name in ("negative", "near the minimum")}
    print(json.dumps(losses | shares | {"tokens": len(ids) - 1}))


if __name__ == "__main__":
    main()
