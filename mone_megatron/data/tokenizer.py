"""Loads Hugging Face tokenizer folders, finds their end-of-document token, and trains one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mone_megatron.data.files import sha256_file

END_OF_TEXT = "<|endoftext|>"
# The files that a tokenizer may be made of (chat templates lie in files of their own, in the
# tokenizer's settings, or in a folder); only the first must be there.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# One id per byte and the end-of-document token.
MIN_VOCAB_SIZE = 257


@dataclass(frozen=True)
class LoadedTokenizer:
    """Holds a tokenizer and the facts about it that data files need."""

    tokenizer: Tokenizer
    folder: Path
    # Largest id + 1 (ids may have holes), unpadded.
    vocab_size: int
    # SHA-256 of tokenizer.json.
    sha256: str


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Loads ``folder/tokenizer.json``, without the truncation and padding it may ask for.

    Raises:
        ValueError: no readable tokenizer there; the message starts with the folder or file.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json")
    # Read and written here: the tokenizers package takes no path that is not UTF-8.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ValueError(f"{path} is not a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return LoadedTokenizer(
        tokenizer=tokenizer,
        folder=folder,
        vocab_size=max(vocabulary.values()) + 1,
        sha256=sha256_file(path),
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a tokenizer, relative to its folder, chat templates included."""
    templates = sorted((folder / _TEMPLATES).glob("*.jinja"))
    found = [folder / name for name in _FILES] + templates
    return [path.relative_to(folder) for path in found if path.is_file()]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer, whole, into a folder that is made if it is not there."""
    target.mkdir(exist_ok=True)
    for name in tokenizer_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def end_of_document(loaded: LoadedTokenizer, eod_token: str | None = None) -> int:
    """Returns the id of the token that ends a document.

    Args:
        loaded: the tokenizer.
        eod_token: that token; None takes ``eos_token`` of ``tokenizer_config.json`` or
            ``special_tokens_map.json``, else ``<|endoftext|>`` or ``</s>`` if the tokenizer has
            exactly one of them.

    Raises:
        ValueError: the tokenizer names none, or lacks the one named.
    """
    name = eod_token or special_token(loaded.folder, "eos_token")
    if name is None:
        vocabulary = loaded.tokenizer.get_vocab(with_added_tokens=True)
        known = [token for token in (END_OF_TEXT, "</s>") if token in vocabulary]
        if len(known) != 1:
            raise ValueError(f"{loaded.folder} names no eos_token: say which token ends a document")
        name = known[0]
    eod: int | None = loaded.tokenizer.token_to_id(name)
    if eod is None:
        raise ValueError(f"{loaded.folder} has no token {name!r} to end a document with")
    return eod


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with ``<|endoftext|>`` as its only special token, of id 0.

    Args:
        texts: the training documents.
        vocab_size: wanted size; a small corpus can give a smaller one.

    Raises:
        ValueError: ``vocab_size`` cannot hold the 256 bytes and the special token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``folder`` so that ``transformers.AutoTokenizer`` loads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_bytes(content.encode("utf-8"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def special_token(folder: Path, kind: str) -> str | None:
    """Returns the text of a special token (``eos_token``, ...) that a tokenizer's settings name.

    Raises:
        ValueError: a settings file is damaged, naming it.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error})") from error
        token = settings.get(kind) if isinstance(settings, dict) else None
        # A token is written as text or, with its options, as an object.
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None
