"""Checks what any exported model has to do, whatever its layers are."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def check_generation(folder: Path) -> None:
    """Generates token by token, with the code that lies beside the weights, as in one forward pass.

    Args:
        folder: the export.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompts = torch.arange(1, 21).view(2, 10)
    texts = model.generate(prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        best = model(texts[:, :-1]).logits[:, 9:].argmax(dim=-1)
    assert torch.equal(texts[:, 10:], best)
