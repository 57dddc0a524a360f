"""A small MoE with its tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hf_models import VOCABULARY, save_model

from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing_tokenizer")
    save_tokenizer(train_tokenizer([TEXT], VOCABULARY), folder)
    return folder


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """OLMoE, which names no layer apart from others."""
    return save_model("olmoe", tmp_path_factory.mktemp("models") / "olmoe", tokenizer)
