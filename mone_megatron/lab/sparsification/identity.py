"""Tells the weights of models apart without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mone_megatron.hf.source import is_ours, open_source
from mone_megatron.report.files import files_identity


def identity_of(where: str) -> str:
    """Returns a digest that changes when a run has gone on, or a folder holds other files.

    Of a run it is that of the newest checkpoint's manifest, which has the sums of all files; of a
    folder in the format of transformers, of the names, sizes and both ends of its configuration
    and weights; of a model on the Hub its name.
    """
    folder = Path(where)
    if not folder.is_dir():
        return where
    if is_ours(folder):
        checkpoint = open_source(folder, say=lambda message: None).checkpoint
        return hashlib.sha256((checkpoint.path / "manifest.json").read_bytes()).hexdigest()
    return files_identity([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
