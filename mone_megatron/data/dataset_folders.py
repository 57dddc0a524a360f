"""Finds the files of datasets that Hugging Face's ``datasets`` saved, and of folders of Parquet.

Understood are a dataset of ``save_to_disk``, a dictionary of such datasets by split, and a folder
of Parquet files as they lie in a repository on the Hub: ``data/train-00000-of-00002.parquet``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OPTION = "--split"
_STATE = "state.json"
_DICTIONARY = "dataset_dict.json"
# What names of Parquet files say of the split that they are a part of.
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


def dataset_files(folder: Path, split: str | None) -> list[Path] | None:
    """Returns the files of a dataset in their order; None for a folder that is no dataset.

    Args:
        folder: of the dataset.
        split: to read; None where there is one only.

    Raises:
        ValueError: the split is not there, or has to be named; the dataset is damaged.
    """
    if (folder / _DICTIONARY).is_file():
        return _saved_files(_of_dictionary(folder, split))
    if (folder / _STATE).is_file():
        if split is not None:
            _check_split(folder, split, [str(_read(folder / _STATE).get("_split"))])
        return _saved_files(folder)
    files = [
        path
        for path in sorted(folder.rglob("*.parquet"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return _of_split(folder, files, split) if files else None


def _of_dictionary(folder: Path, split: str | None) -> Path:
    splits = _read(folder / _DICTIONARY).get("splits")
    if not isinstance(splits, list) or not splits:
        raise ValueError(f"{folder / _DICTIONARY}: names no splits; save the dataset again")
    names = list(map(str, splits))
    if split is None and len(names) > 1:
        raise ValueError(_which(folder, names))
    if split is not None:
        _check_split(folder, split, names)
    return folder / (names[0] if split is None else split)


def _saved_files(folder: Path) -> list[Path]:
    """Returns the files that ``state.json`` of a saved dataset lists."""
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: an index chooses its rows; save it again after flatten_indices()"
        )
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise ValueError(f"{folder / _STATE}: lists no files; save the dataset again") from None
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: is missing, and {folder / _STATE} lists it")
    return files


def _of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    by_file = {path: _split_of(path.relative_to(folder)) for path in files}
    names = sorted({name for name in by_file.values() if name is not None})
    if split is None:
        if len(names) > 1:
            raise ValueError(_which(folder, names))
        return list(files)
    _check_split(folder, split, names)
    return [path for path, name in by_file.items() if name == split]


def _split_of(path: Path) -> str | None:
    """Returns the split that the name of a Parquet file, or of its folder, tells."""
    if found := _SHARD.fullmatch(path.stem):
        return found["split"]
    for name in (path.stem, *reversed(path.parts[:-1])):
        if name in _SPLITS:
            return name
    return None


def _check_split(folder: Path, split: str, names: Sequence[str]) -> None:
    if split not in names:
        there = f"there is {', '.join(names)}" if names else "its files name none"
        raise ValueError(f"{_OPTION}: {split} is no split of {folder}; {there}")


def _which(folder: Path, names: Sequence[str]) -> str:
    return f"{folder}: has the splits {', '.join(names)}; choose one with {_OPTION}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save the dataset again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; save the dataset again")
    return content
