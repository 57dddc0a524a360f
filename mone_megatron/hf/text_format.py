"""Reads and writes what a folder says of the special tokens around a model's documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from mone_megatron.data.framing import Framing, begin_texts_with, framing_of, template_opening
from mone_megatron.data.tokenizer import copy_tokenizer, load_tokenizer

# Lies in every export of ours; other models have none.
RECIPE_NAME = "training_config.yaml"
RECIPE_KEY = "framing"


def framing_of_folder(folder: Path, tokenizer: Tokenizer, eod: int | None) -> Framing:
    """Returns what a model in the format of transformers saw around documents.

    An export of ours says it. Any other model is taken to be trained as its tokenizer's own
    template begins a text, and with its ``eos_token`` after each document.

    Args:
        folder: of the model; need not be there (a model of the Hub).
        tokenizer: its own.
        eod: id of its ``eos_token``; None when it names none.

    Raises:
        ValueError: the export's recipe is damaged.
    """
    recipe = folder / RECIPE_NAME
    if not recipe.is_file():
        return Framing(template_opening(tokenizer), eod)
    try:
        content: Any = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{recipe} is damaged; export the model again") from None
    facts = content.get(RECIPE_KEY) if isinstance(content, dict) else None
    return framing_of(facts, eod=eod, where=str(recipe)).known_by(tokenizer)


def describe(framing: Framing, tokenizer_dir: Path) -> str:
    """Returns in words how documents began, for tools and the model card."""
    try:
        tokenizer: Tokenizer | None = load_tokenizer(tokenizer_dir).tokenizer
    except ValueError:
        tokenizer = None
    return framing.describe(tokenizer)


def follow(tokenizer: Any, framing: Framing) -> None:
    """Makes a fast tokenizer of transformers begin texts, and name their end, as in training."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    begin_texts_with(backend, framing.opening)
    if framing.eod is not None and tokenizer.eos_token_id != framing.eod:
        tokenizer.eos_token = backend.id_to_token(framing.eod)


def write_tokenizer(source: Path, folder: Path, framing: Framing) -> None:
    """Copies a tokenizer into an export so that any program begins texts as in training.

    The files are copied as they are where the tokenizer does so by itself. Otherwise its template
    is changed; and where a document ended with another token than its ``eos_token``, that is, too.
    """
    copy_tokenizer(source, folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    tokenizer = Tokenizer.from_buffer(path.read_bytes())
    if begin_texts_with(tokenizer, framing.opening):
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    changes = {}
    if framing.eod is not None:
        changes["eos_token"] = tokenizer.id_to_token(framing.eod)
    if framing.opening:
        changes["bos_token"] = tokenizer.id_to_token(framing.opening[-1])
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    wanted = {
        name: token for name, token in changes.items() if _content(settings.get(name)) != token
    }
    if wanted:
        config.write_text(json.dumps(settings | wanted, indent=2) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    """Returns the text of a special token, which settings give as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token
