"""An export generates what the training model would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_export import export_run, open_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from mone_megatron.hf.checks import real_tokens
from mone_megatron.hf.megatron_forward import megatron_forward
from mone_megatron.testing.launch import run_layouts


def greedy(run: Path, prompts: Tensor, new_tokens: int) -> Tensor:
    """The training model's choice of each next token, everything computed anew each time."""
    with megatron_forward(open_run(run), dtype=torch.float32) as model:
        for _ in range(new_tokens):
            following = model.logits(prompts)[:, -1].argmax(dim=-1, keepdim=True)
            prompts = torch.cat([prompts, following], dim=-1)
    return prompts


def check(run: Path, output: Path, *, prompts: int, length: int, new_tokens: int) -> None:
    source = open_run(run)
    export_run(source, output)
    tokens = real_tokens(source.tokenizer_dir, sequences=prompts, length=length)
    model = AutoModelForCausalLM.from_pretrained(output)
    # Like the training model, past the end of a document, too.
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    assert generated.shape == (prompts, length + new_tokens)
    assert torch.equal(generated, greedy(run, tokens, new_tokens))


def test_tiny_mone(tmp_path: Path) -> None:
    overrides = ["experiment=tiny_mone", "device=cpu", "train.steps=6", "optim.lr=1e-2"]
    quiet = ["checkpoint.interval=6", "logging.report=false", "logging.wandb.mode=disabled"]
    run_layouts({"run": [*overrides, *quiet]}, processes=1, folder=tmp_path)
    check(tmp_path / "run", tmp_path / "hf", prompts=4, length=24, new_tokens=24)


@pytest.mark.slow
def test_quickstart_mone_20_prompts_of_64_tokens(tmp_path: Path) -> None:
    overrides = ["experiment=quickstart_mone", "device=cpu", "logging.wandb.mode=disabled"]
    run_layouts({"run": overrides}, processes=2, folder=tmp_path, timeout=1800)
    check(tmp_path / "run", tmp_path / "hf", prompts=20, length=64, new_tokens=64)
