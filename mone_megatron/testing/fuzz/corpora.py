"""Makes the corpora that the fuzzer's runs read, and names the settings that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mone_megatron.testing.words import write_words

# Name -> how often it is drawn.
SHARES: Mapping[str, int] = {"words": 6, "blend": 1, "stdlib": 2}
_SIZE = 512


def make_corpora(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the overrides that read each corpus, which is made where it is not there yet.

    Args:
        folder: for the corpora. What is there is taken as it is.
    """
    words, short = folder / "words", folder / "short"
    if not short.with_suffix(".idx").exists():
        _write(folder)
    cache = {"data.cache_dir": str(folder / "cache")}
    indexed = {"data.source": "indexed", **cache}
    return {
        "words": {**indexed, "data.paths": f"[{words}]"},
        "blend": {**indexed, "data.paths": f"[{words},{short}]", "data.weights": "[0.7,0.3]"},
        "stdlib": {**cache, "data.max_megabytes": "0.2", "data.vocab_size": str(_SIZE)},
    }


def _write(folder: Path) -> None:
    from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files

    folder.mkdir(parents=True, exist_ok=True)
    text = write_words(folder / "words.jsonl")
    preprocess_files([text], folder / "words", TokenizerSettings(train_vocab_size=_SIZE))
    # Documents of a few words, which many samples have several of.
    lines = text.read_text(encoding="utf-8").splitlines()
    short = folder / "short.jsonl"
    few = [json.loads(line)["text"].split()[: 3 + number % 9] for number, line in enumerate(lines)]
    short.write_text("".join(json.dumps({"text": " ".join(one)}) + "\n" for one in few), "utf-8")
    tokenizer = TokenizerSettings(folder=_tokenizer(folder))
    preprocess_files([short], folder / "short", tokenizer)


def _tokenizer(folder: Path) -> Path:
    """Returns the tokenizer that was trained on the words."""
    (found,) = {path.parent for path in folder.rglob("tokenizer.json")}
    return found
