"""Corpora as windows, bytes of tokens, and the loss of a model on them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import TEXT
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.evaluation.corpora import Reader, open_corpus
from mone_megatron.evaluation.perplexity import Perplexity, measure_perplexity
from mone_megatron.evaluation.token_bytes import bytes_of_tokens

Models = tuple[Path, Path]


@pytest.fixture(scope="session")
def reader(models: Models) -> Reader:
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    return Reader(tokenizer, len(tokenizer), 32)


@given(text=st.text(max_size=60))
def test_bytes_of_tokens_add_up_to_the_text(text: str, reader: Reader) -> None:
    sizes = bytes_of_tokens(reader.tokenizer.backend_tokenizer, reader.vocab_size)
    assert sizes is not None
    tokens = reader.tokenizer.encode(text, add_special_tokens=False)
    assert int(sizes[tokens].sum()) == len(text.encode("utf-8"))
    assert sizes[reader.end_of_text] == 0


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5), cut=st.integers(1, 40))
def test_every_token_is_predicted_once(
    lengths: list[int], cut: int, reader: Reader, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = ["x" * length for length in lengths]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    corpus = open_corpus(str(path))
    narrow = Reader(reader.tokenizer, reader.vocab_size, cut)
    if not any(texts):
        with pytest.raises(ValueError, match="holds no text"):
            corpus.windows(narrow)
        return
    windows = list(corpus.windows(narrow))
    end = reader.end_of_text
    expected = [end]
    for text in filter(None, texts):
        expected += [*reader.tokenizer.encode(text), end]
    assert (
        np.concatenate([windows[0][:1], *(window[1:] for window in windows)]).tolist() == expected
    )
    assert all(window.size == cut + 1 for window in windows[:-1])
    assert all(one[-1] == next_[0] for one, next_ in pairwise(windows))


def measure(folder: Path, windows: object, batch_size: int = 4, **more: object) -> Perplexity:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = bytes_of_tokens(tokenizer.backend_tokenizer, len(tokenizer))
    return measure_perplexity(
        model, windows, bytes_of_token=sizes, batch_size=batch_size, **more  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[:3000], encoding="utf-8")
    return path


def test_the_loss_is_that_of_transformers(models: Models, reader: Reader, text_file: Path) -> None:
    windows = open_corpus(str(text_file)).windows(reader)
    found = measure(models[0], windows)
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            ids = torch.from_numpy(window)[None]
            # transformers shifts the labels itself.
            nats += float(model(input_ids=ids, labels=ids).loss) * (window.size - 1)
            tokens += window.size - 1
    assert found.tokens == tokens == sum(window.size - 1 for window in windows)
    assert found.loss.value == pytest.approx(nats / tokens, abs=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found.text_bytes == len(TEXT[:3000].encode("utf-8"))
    assert found.bits_per_byte is not None
    expected_bits = nats / math.log(2) / found.text_bytes
    assert found.bits_per_byte.value == pytest.approx(expected_bits, rel=1e-5)


def test_batches_and_limits_change_what_they_should(
    models: Models, reader: Reader, text_file: Path
) -> None:
    windows = open_corpus(str(text_file)).windows(reader)
    alone, together = measure(models[0], windows, 1), measure(models[0], windows, 16)
    assert alone.loss.value == pytest.approx(together.loss.value, abs=1e-6)
    assert alone.fingerprint == together.fingerprint
    short = measure(models[0], windows, max_tokens=60)
    assert (short.tokens, short.windows) == (64, 2)
    assert short.fingerprint != alone.fingerprint


def test_an_indexed_corpus_reads_as_its_text(
    models: Models, reader: Reader, text_file: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "corpus"
    preprocess_files([text_file], prefix, TokenizerSettings(folder=models[0]))
    indexed = list(open_corpus(str(prefix)).windows(reader))
    assert np.concatenate([window[1:] for window in indexed]).tolist() == [
        *reader.tokenizer.encode(TEXT[:3000]),
        reader.end_of_text,
    ]
    of_text = open_corpus(str(text_file)).windows(reader)
    assert [window.tolist() for window in indexed] == [window.tolist() for window in of_text]
    # Also by the name of either file.
    assert len(open_corpus(f"{prefix}.bin").windows(reader)) == len(indexed)


def test_tokens_of_another_tokenizer_are_refused(
    reader: Reader, text_file: Path, tmp_path: Path
) -> None:
    save_tokenizer(train_tokenizer(["quite another text"], 300), tmp_path / "other")
    prefix = tmp_path / "corpus"
    preprocess_files([text_file], prefix, TokenizerSettings(folder=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"vocabulary is not the model's; give the text itself"):
        open_corpus(str(prefix)).windows(reader)
    # Without the facts beside it, by its ids.
    (tmp_path / "corpus.meta.json").unlink()
    (tmp_path / "corpus.tokenizer").rename(tmp_path / "elsewhere")
    small = Reader(reader.tokenizer, 50, 32)
    with pytest.raises(ValueError, match=r"holds token \d+ and the model knows 50"):
        open_corpus(str(prefix)).windows(small)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "empty.txt", "empty"),
        (None, "absent.txt", "neither a run"),
        ("x", "strange.xyz", "unknown extension"),
        ('{"body": "x"}\n', "other.jsonl", "no key 'text'"),
    ],
)
def test_what_is_no_corpus_is_refused(
    content: str | None, name: str, message: str, tmp_path: Path, reader: Reader
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_corpus(str(path)).windows(reader)
    with pytest.raises(ValueError, match=r"is no run"):
        open_corpus(str(tmp_path))
