"""The special tokens around documents: chosen once, kept, and followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors

from mone_megatron.config.schema import Config
from mone_megatron.data.framing import (
    BosChoice,
    Framing,
    begin_texts_with,
    choose_framing,
    framing_of,
    template_opening,
)
from mone_megatron.data.indexed import bin_path, read_index
from mone_megatron.data.prepare import prepare_data
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.sidecar import read_sidecar, sidecar_path
from mone_megatron.data.tokenizer import load_tokenizer
from mone_megatron.testing.tokenizers import with_bos

from .conftest import make_texts, write_jsonl

MakeConfig = Callable[..., Config]
EOS = 0


def corpus(folder: Path, tokenizer: Path, bos: BosChoice = "auto", name: str = "corpus") -> Path:
    source = write_jsonl(folder / f"{name}.jsonl", ["", *make_texts(80)])
    settings = TokenizerSettings(folder=tokenizer, bos=bos)
    return preprocess_files([source], folder / name, settings).prefix


def documents(prefix: Path) -> list[list[int]]:
    index = read_index(prefix)
    tokens = np.fromfile(bin_path(prefix), dtype=index.dtype)
    return [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])]


@pytest.mark.parametrize(
    ("template", "choice", "begins"),
    [
        ("<s> $A", "auto", True),
        ("<s> $A", "always", True),
        ("<s> $A", "never", False),
        ("<s> $A <|endoftext|>", "auto", True),
        ("$A <|endoftext|>", "auto", False),
        ("", "auto", False),
        ("", "always", True),
    ],
)
def test_the_choice_is_made_kept_and_known_to_a_run(
    template: str,
    choice: BosChoice,
    begins: bool,
    tmp_path: Path,
    tokenizer_dir: Path,
    make_config: MakeConfig,
) -> None:
    bos = with_bos(tokenizer_dir, tmp_path / "bos", template=template)
    prefix = corpus(tmp_path, tmp_path / "bos", choice)
    opening = [bos] if begins else []
    found = documents(prefix)
    assert len(found) == 80
    for document, text in zip(found, make_texts(80), strict=True):
        encode = load_tokenizer(tokenizer_dir).tokenizer.encode
        assert document == [*opening, *encode(text).ids, EOS]
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    kept = {"opening": opening, "eod": EOS, "parse_special_tokens": False}
    assert sidecar.framing == kept
    prepared = prepare_data(make_config(prefix))
    assert prepared.framing == Framing(tuple(opening), EOS)
    assert prepared.beginning == (
        "each text begins with <s>" if begins else "texts begin without BOS"
    )


def test_a_bos_that_is_not_there_is_refused(tokenizer_dir: Path) -> None:
    loaded = load_tokenizer(tokenizer_dir)
    with pytest.raises(ValueError, match=r"--bos always: .* names no bos_token"):
        choose_framing(loaded, bos="always")
    with pytest.raises(ValueError, match="--bos always needs --tokenizer"):
        TokenizerSettings(train_vocab_size=300, bos="always")
    with pytest.raises(ValueError, match="'sometimes' is not auto, always or never"):
        choose_framing(loaded, bos="sometimes")  # type: ignore[arg-type]


def test_corpora_made_before_it_was_kept(
    tmp_path: Path, tokenizer_dir: Path, make_config: MakeConfig
) -> None:
    with_bos(tokenizer_dir, tmp_path / "bos")
    prefix = corpus(tmp_path, tmp_path / "bos", "never")
    sidecar = json.loads(sidecar_path(prefix).read_text())
    del sidecar["framing"]
    sidecar_path(prefix).write_text(json.dumps(sidecar))
    prepared = prepare_data(make_config(prefix))
    assert prepared.framing.opening == ()
    assert prepared.beginning == (
        "texts begin without BOS (made before this was recorded, when none had one)"
    )
    # Where the tokenizer has none there is nothing to assume.
    plain = corpus(tmp_path, tokenizer_dir, name="plain")
    sidecar = json.loads(sidecar_path(plain).read_text())
    del sidecar["framing"]
    sidecar_path(plain).write_text(json.dumps(sidecar))
    assert prepare_data(make_config(plain)).beginning == "texts begin without BOS"


@pytest.mark.parametrize("choice", ["always", "never"])
def test_another_tools_corpus_shows_it(
    choice: BosChoice, tmp_path: Path, tokenizer_dir: Path, make_config: MakeConfig
) -> None:
    bos = with_bos(tokenizer_dir, tmp_path / "bos")
    prefix = corpus(tmp_path, tmp_path / "bos", choice)
    sidecar_path(prefix).unlink()
    prepared = prepare_data(make_config(prefix))
    assert prepared.framing.opening == ((bos,) if choice == "always" else ())
    assert "as its first 80 documents do" in prepared.beginning


def test_corpora_that_begin_differently_are_not_mixed(
    tmp_path: Path, tokenizer_dir: Path, make_config: MakeConfig
) -> None:
    with_bos(tokenizer_dir, tmp_path / "bos")
    one = corpus(tmp_path, tmp_path / "bos", "auto", "one")
    two = corpus(tmp_path, tmp_path / "bos", "never", "two")
    with pytest.raises(ValueError, match=r"documents begin differently .* with one --bos"):
        prepare_data(make_config(one, two))


@pytest.mark.parametrize(
    "facts", [{}, {"opening": ["x"], "eod": 0, "parse_special_tokens": False}, {"opening": 3}]
)
def test_damaged_facts_are_refused(facts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^here is damaged"):
        framing_of(facts, eod=None, where="here")


def test_facts_come_back(tmp_path: Path) -> None:
    framing = Framing((3, 4), 7, parse_special_tokens=True)
    facts = json.loads(json.dumps(framing.as_facts()))
    assert framing_of(facts, eod=None, where="") == framing
    old = framing_of(None, eod=7, where="")
    assert replace(old, assumed="") == Framing((), 7)


@pytest.mark.parametrize("before", ["none", "bytes", "bos", "bos and bytes", "bos and eos"])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_template_is_made_to_begin_texts(before: str, wanted: int, tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "[g]"])
    ids = [tokenizer.token_to_id(name) for name in ("<s>", "[g]")]
    level = processors.ByteLevel(trim_offsets=True)
    of_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids[0])])
    of_both = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", ids[0])])
    if before != "none":
        tokenizer.post_processor = {
            "bytes": level,
            "bos": of_bos,
            "bos and bytes": processors.Sequence([level, of_bos]),
            "bos and eos": of_both,
        }[before]
    opening = tuple(ids[:wanted])
    plain = tokenizer.encode("the fox", add_special_tokens=False).ids
    changed = begin_texts_with(tokenizer, opening)
    again = Tokenizer.from_str(tokenizer.to_str())
    # Padding is no template.
    again.enable_padding(direction="left", length=9)
    assert template_opening(again) == opening
    again.no_padding()
    assert again.encode("the fox").ids == [*opening, *plain]
    assert template_opening(again) == opening
    assert begin_texts_with(again, opening) is False
    same = {"none": 0, "bytes": 0, "bos": 1, "bos and bytes": 1, "bos and eos": None}[before]
    assert changed == (wanted != same)
    if "bytes" in before:
        settings = json.loads(again.to_str())["post_processor"]
        assert "ByteLevel" in json.dumps(settings)
    assert isinstance(again.pre_tokenizer, pre_tokenizers.ByteLevel)
