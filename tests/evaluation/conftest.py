"""Two small random models of a stock architecture, with a tokenizer, and the example tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_helpers import MAX_LENGTH, TEXT
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.evaluation.example_tasks import write_example_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([TEXT], 600)
    paths = folder / "one", folder / "two"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            max_position_embeddings=MAX_LENGTH,
            # Larger than usual, so that predictions differ from one another.
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        save_tokenizer(tokenizer, path)
    return paths


@pytest.fixture(scope="session")
def example_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_example_tasks(tmp_path_factory.mktemp("tasks"))
