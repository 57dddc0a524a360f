from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mone_megatron.config.schema import Config, DataConfig, TrainConfig
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "neurons",
    "fire",
    "é",
    "ü",
    "漢字",
    "\n",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    lines = [json.dumps({key: text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def expected_documents(tokenizer_dir: Path, texts: Sequence[str], eod: int = 0) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    return [[*tokenizer.encode(text).ids, eod] for text in texts]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    save_tokenizer(train_tokenizer(make_texts(100), 300), folder)
    return folder


@pytest.fixture
def make_corpus(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """Writes a small corpus and returns its prefix."""

    def make(name: str = "corpus", documents: int = 80, seed: int = 0) -> Path:
        source = write_jsonl(tmp_path / f"{name}.jsonl", make_texts(documents, seed))
        prefix = tmp_path / name
        settings = TokenizerSettings(folder=tokenizer_dir)
        return preprocess_files([source], prefix, settings, overwrite=True).prefix

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A configuration over indexed paths; keywords go to the data group."""

    def make(*paths: Path, train: TrainConfig | None = None, **data: object) -> Config:
        settings: dict[str, object] = {
            "source": "indexed",
            "paths": tuple(map(str, paths)),
            "split": (0.8, 0.2, 0.0),
            "cache_dir": str(tmp_path / "cache"),
        }
        settings.update(data)
        train = train or TrainConfig(seq_length=16, seed=7, eval_interval=10)
        return Config(data=DataConfig(**settings), train=train)  # type: ignore[arg-type]

    return make
