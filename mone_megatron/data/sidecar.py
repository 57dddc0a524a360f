"""Keeps ``PREFIX.meta.json``: what is known of a corpus without reading it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Sidecar:
    """Holds the facts that ``tools/preprocess_data.py`` writes beside a corpus."""

    format: int
    # Size of the tokenizer's vocabulary (largest id + 1, unpadded).
    vocab_size: int
    eod: int
    max_token: int
    tokens: int
    documents: int
    bin_bytes: int
    bin_sha256: str
    # `files.quick_digest` of the .bin: what every start compares.
    bin_quick_digest: str
    idx_bytes: int
    idx_sha256: str
    # Name, without directories, of the tokenizer folder beside the corpus.
    tokenizer: str
    # SHA-256 of its tokenizer.json.
    tokenizer_sha256: str
    # How documents became tokens, as `framing.Framing.as_facts` gives it; None in a sidecar that
    # was written before this was kept.
    framing: dict[str, Any] | None = None
    # How the documents were read out of their files, as `documents.InputSettings.as_facts` gives
    # it; None where it was not kept.
    reading: dict[str, Any] | None = None


def sidecar_path(prefix: Path) -> Path:
    """Returns the path of a corpus prefix's sidecar."""
    return prefix.with_name(prefix.name + ".meta.json")


def tokenizer_path(prefix: Path) -> Path:
    """Returns the path of a corpus prefix's tokenizer folder."""
    return prefix.with_name(prefix.name + ".tokenizer")


def dump_sidecar(sidecar: Sidecar) -> str:
    """Returns the sidecar as JSON text."""
    return json.dumps(asdict(sidecar), indent=2) + "\n"


def read_sidecar(prefix: Path) -> Sidecar | None:
    """Returns the sidecar of a corpus; None if there is none (a corpus another tool wrote).

    Raises:
        ValueError: the file is not a sidecar; the message starts with its name.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sidecar = Sidecar(**values)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    for name, value in asdict(sidecar).items():
        expected = Sidecar.__annotations__[name]
        if name in ("framing", "reading"):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{path} is damaged ({name} is no object)")
        elif type(value).__name__ != expected:
            raise ValueError(f"{path} is damaged ({name} is not of type {expected})")
    if sidecar.format != FORMAT:
        raise ValueError(f"{path} has format {sidecar.format}, this version reads {FORMAT}")
    if Path(sidecar.tokenizer).name != sidecar.tokenizer:
        raise ValueError(f"{path} is damaged (tokenizer must be a plain folder name)")
    return sidecar
