"""Checks exports in plain transformers, beside what the tool that writes them checks itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mone_megatron.hf.checks import load_for_check

# Rounding of a product of one row for one of many, over the scale of logits.
_DECODING = 1e-3
_TOKENS = 12


def _plain(folder: Path) -> PreTrainedModel:
    """Loads an export as a user does, with the code that lies beside the weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    return model.eval()


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    length = min(_TOKENS, int(getattr(model.config, "max_position_embeddings", _TOKENS)))
    return torch.randint(1, model.config.vocab_size, (2, length), generator=generator)


@torch.no_grad()
def loading_problems(folder: Path) -> list[str]:
    """Returns where plain transformers computes another thing than our own classes."""
    plain, ours = _plain(folder), load_for_check(folder)
    tokens_BS = _prompt(plain)
    one, other = plain(tokens_BS).logits, ours(tokens_BS).logits
    if torch.equal(one, other):
        return []
    return [f"plain transformers gives other logits, by up to {(one - other).abs().max():.1e}"]


@torch.no_grad()
def decoding_problems(folder: Path) -> list[str]:
    """Returns where decoding token by token differs from the forward pass of the whole."""
    model = _plain(folder)
    tokens_BS = _prompt(model)
    whole_BSV = model(tokens_BS, use_cache=False).logits
    cache = None
    parts = []
    for position in range(tokens_BS.shape[1]):
        here = tokens_BS[:, position : position + 1]
        step = model(here, cache=cache, use_cache=True)
        cache = step.cache
        parts.append(step.logits)
    scale = float(whole_BSV.square().mean().sqrt())
    apart_BS = (torch.cat(parts, dim=1) - whole_BSV).abs().amax(dim=-1)
    wrong = (apart_BS > _DECODING * scale).float().mean()
    # A tie that falls otherwise changes a token, and those after it.
    if wrong > 0.25:
        most = float(apart_BS.max()) / scale
        return [f"token by token {wrong:.0%} of tokens differ, by up to {most:.1e} of the scale"]
    return []


def file_problems(folder: Path, again: Path) -> list[str]:
    """Returns what an export lost on the way through an import and another export."""
    found = []
    one, other = (_tensors(where) for where in (folder, again))
    if one.keys() != other.keys():
        found.append(f"other tensors after an import: {sorted(one.keys() ^ other.keys())[:3]}")
    for name in one.keys() & other.keys():
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name]):
            found.append(f"{name} has other values after an import")
            break
    settings = [json.loads((where / "config.json").read_text("utf-8")) for where in (folder, again)]
    for key in [*settings[0], *(key for key in settings[1] if key not in settings[0])]:
        if settings[0].get(key) != settings[1].get(key):
            found.append(
                f"config.json: {key} is {settings[1].get(key)} after an import, not "
                f"{settings[0].get(key)}"
            )
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held |= load_file(path)
    return held
