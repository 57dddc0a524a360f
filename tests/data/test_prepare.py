from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config, DataConfig, TrainConfig
from mone_megatron.data.indexed import CorpusIndex, bin_path, idx_path, read_index
from mone_megatron.data.prepare import prepare_data
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.sidecar import sidecar_path, tokenizer_path

from .conftest import make_texts, write_jsonl

MakeCorpus = Callable[..., Path]
MakeConfig = Callable[..., Config]


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_data(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_prepares_an_indexed_corpus(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    prepared = prepare_data(make_config(prefix))
    assert prepared.prefixes == (str(prefix),)
    assert prepared.weights is None
    assert (prepared.vocab_size, prepared.eod) == (300, 0)
    assert prepared.tokens == read_index(prefix).tokens
    assert Path(prepared.tokenizer_dir) == tokenizer_path(prefix)
    assert prepared == prepare_data(make_config(prefix))


def test_prepares_the_stdlib_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from mone_megatron.config.schema import Config, DataConfig
from mone_megatron.data.prepare import prepare_data
data = DataConfig(cache_dir={str(tmp_path)!r}, max_megabytes=0.3, vocab_size=300)
assert prepare_data(Config(data=data)).vocab_size == 300
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_weights(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    a, b = make_corpus("a", 80), make_corpus("b", 40, seed=1)
    given = prepare_data(make_config(a, b, weights=(3.0, 1.0)))
    assert given.weights == (0.75, 0.25)
    by_size = prepare_data(make_config(a, b))
    sizes = [read_index(prefix).tokens for prefix in (a, b)]
    assert by_size.weights == pytest.approx([size / sum(sizes) for size in sizes])


def test_fingerprint_tells_data_apart(
    tmp_path: Path, make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    a, b = make_corpus("a"), make_corpus("b", seed=1)
    configs = [
        make_config(a, b),
        make_config(b, a),
        make_config(a),
        make_config(a, b, weights=(2.0, 1.0)),
        make_config(a, b, split=(0.7, 0.3, 0.0)),
    ]
    prints = [prepare_data(config).fingerprint for config in configs]
    assert len(set(prints)) == len(prints)
    # Moving the data changes nothing; changing it does.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("a.*"):
        if path.suffix != ".jsonl":
            path.rename(moved / path.name)
    assert prepare_data(make_config(moved / "a")).fingerprint == prints[2]
    make_corpus("a", seed=5)
    assert prepare_data(make_config(a)).fingerprint != prints[2]


def test_refuses_damaged_data(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    good, prefix = make_corpus("good"), make_corpus("bad", seed=1)
    config = make_config(good, prefix)
    content = bin_path(prefix).read_bytes()

    bin_path(prefix).write_bytes(content[: len(content) // 2])
    message = refusal(config)
    assert message.startswith("data.paths[1]: ")
    assert "bad.bin is truncated" in message
    assert "tools/preprocess_data.py" in message
    # A changed token that any size check misses.
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    bin_path(prefix).write_bytes(bytes(flipped))
    assert "bad.bin is not the file bad.meta.json was written for" in refusal(config)
    bin_path(prefix).write_bytes(content)

    index = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(index[:-1])
    assert "bad.idx is truncated" in refusal(config)
    idx_path(prefix).unlink()
    assert "bad.idx does not exist" in refusal(config)
    idx_path(prefix).write_bytes(index)

    sidecar_path(prefix).write_text("{")
    assert "bad.meta.json is damaged" in refusal(config)


def test_refuses_sidecar_that_leaves_its_folder(
    make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    prefix = make_corpus()
    values = json.loads(sidecar_path(prefix).read_text())
    for changes in ({"tokenizer": "../elsewhere"}, {"eod": "0"}, {"extra": 1}, {"format": 99}):
        sidecar_path(prefix).write_text(json.dumps({**values, **changes}))
        assert "corpus.meta.json" in refusal(make_config(prefix))


def test_refuses_paths(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    message = refusal(make_config(bin_path(prefix)))
    assert message == f"data.paths[0]: give the prefix without its extension, {prefix}"
    assert "data.paths[1]" in refusal(make_config(prefix, prefix))
    assert "nowhere.bin does not exist" in refusal(make_config(prefix.with_name("nowhere")))


def test_refuses_short_splits(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus(documents=10)
    long = TrainConfig(seq_length=4096, eval_interval=0)
    message = refusal(make_config(prefix, train=long))
    assert message.startswith("data.paths[0]: the training split of ")
    assert "train.seq_length + 1 = 4097" in message
    thin = {"split": (0.99, 0.01, 0.0)}
    evaluated = TrainConfig(seq_length=16, eval_interval=5)
    assert refusal(make_config(prefix, train=evaluated, **thin)).startswith("data.split: ")
    prepare_data(make_config(prefix, train=replace(evaluated, eval_interval=0), **thin))


def test_refuses_vocabularies(make_corpus: MakeCorpus, make_config: MakeConfig) -> None:
    prefix = make_corpus()
    largest = read_index(prefix).max_token()
    config = make_config(prefix)
    small = replace(config, model=replace(config.model, vocab_size=largest))
    assert refusal(small).startswith(f"model.vocab_size={largest}: ")
    exact = replace(config, model=replace(config.model, vocab_size=largest + 1))
    assert prepare_data(exact).vocab_size == largest + 1


def strip_to_foreign(prefix: Path) -> None:
    """Leaves what another Megatron tool would have written."""
    sidecar_path(prefix).unlink()
    shutil.rmtree(tokenizer_path(prefix))


def test_foreign_corpus(
    make_corpus: MakeCorpus,
    make_config: MakeConfig,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = make_corpus()
    strip_to_foreign(prefix)
    assert "set data.tokenizer to a tokenizer folder" in refusal(make_config(prefix))
    config = make_config(prefix, tokenizer=str(tokenizer_dir))
    prepared = prepare_data(config)
    assert (prepared.vocab_size, prepared.eod) == (300, 0)
    # The scan of the tokens is remembered.
    with monkeypatch.context() as patch:
        patch.setattr(CorpusIndex, "max_token", lambda self: pytest.fail("scanned again"))
        assert prepare_data(config) == prepared
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    tokens[5] = 300
    tokens.tofile(bin_path(prefix))
    message = refusal(config)
    assert "holds token 300, past the 300 entries of its tokenizer" in message


def test_refuses_tokenizers(
    tmp_path: Path, make_corpus: MakeCorpus, make_config: MakeConfig
) -> None:
    prefix = make_corpus("a")
    source = write_jsonl(tmp_path / "b.jsonl", make_texts(80))
    other = tmp_path / "b"
    preprocess_files([source], other, TokenizerSettings(train_vocab_size=280))
    assert refusal(make_config(prefix, other)).startswith("data.paths[1]: its tokens were made by")
    wrong = make_config(prefix, tokenizer=str(tokenizer_path(other)))
    assert "data.paths[0]: its tokens were made by another" in refusal(wrong)
    missing = make_config(prefix, tokenizer=str(tmp_path / "nowhere"))
    assert refusal(missing).startswith("data.tokenizer: ")
    (tokenizer_path(prefix) / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refusal(make_config(prefix))


def test_end_of_document_comes_from_the_corpus(
    tmp_path: Path, make_corpus: MakeCorpus, make_config: MakeConfig, tokenizer_dir: Path
) -> None:
    source = write_jsonl(tmp_path / "e.jsonl", make_texts(80))
    prefix = tmp_path / "e"
    settings = TokenizerSettings(folder=tokenizer_dir, eod_token="e")
    preprocess_files([source], prefix, settings)
    assert prepare_data(make_config(prefix)).eod != 0
    assert refusal(make_config(make_corpus("a"), prefix)).startswith("data.paths: documents end")


def test_refuses_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    data = DataConfig(cache_dir=str(blocked), max_megabytes=0.1, vocab_size=280)
    assert refusal(Config(data=data)).startswith(f"data.cache_dir={blocked}: ")
