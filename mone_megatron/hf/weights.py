"""Reads the weights of a Hugging Face folder by name: first headers, then tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mone_megatron.hf.dtypes import STORED, dtype_name, main_dtype

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HFWeights:
    """Holds the tensors of one folder, its files open; see :func:`open_weights`."""

    def __init__(self, folder: Path, files: dict[str, Any]) -> None:
        self.folder = folder
        self._file_of = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118
        self._handles = files

    @property
    def names(self) -> set[str]:
        """Returns the name of every tensor."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, from the header."""
        return tuple(self._handles[self._file_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Reads a tensor, onto the CPU.

        Raises:
            ValueError: its file is shorter than its header says.
        """
        file = self._file_of[name]
        try:
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self.folder / file}: {name} cannot be read ({error})") from None
        return tensor

    def _stored_as(self, name: str) -> str:
        """Returns the dtype of a tensor as its file's header names it: ``BF16``."""
        return str(self._handles[self._file_of[name]].get_slice(name).get_dtype())

    def check_dtypes(self) -> None:
        """Refuses tensors in dtypes that are not read: quantised ones.

        Raises:
            ValueError: a line for each, by name (for the first ten).
        """
        other = [name for name in sorted(self.names) if self._stored_as(name) not in STORED]
        if other:
            lines = [
                f"{self.folder}: {name} is stored as {self._stored_as(name)}, which is not read; "
                f"convert the model to {', '.join(map(dtype_name, STORED.values()))} first"
                for name in other[:10]
            ]
            more = [f"{self.folder}: and {len(other) - 10} more"] if len(other) > 10 else []
            raise ValueError("\n".join(lines + more))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor that :meth:`check_dtypes` accepts, from the header."""
        return STORED[self._stored_as(name)]

    @property
    def main_dtype(self) -> torch.dtype:
        """Returns the dtype of most elements, of tensors that :meth:`check_dtypes` accepts."""
        return main_dtype(
            (self.dtype(name), torch.Size(self.shape(name)).numel()) for name in self.names
        )


@contextmanager
def open_weights(folder: Path) -> Iterator[HFWeights]:
    """Yields the weights of a folder's safetensors files, which are open within the block.

    Raises:
        ValueError: none there, pickled weights only, a truncated file, a file missing or outside
            the folder, a tensor that the index names and no file holds or the reverse; by name.
    """
    index = _read_index(folder)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for file in sorted(set(index.values())) if index else [_SINGLE]:
            files[file] = stack.enter_context(_open(folder, file))
        weights = HFWeights(folder, files)
        if index:
            _check_index(folder, index, files)
        yield weights


def _read_index(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor; empty when there is one file and no index."""
    path = folder / _INDEX
    if not path.is_file():
        if (folder / _SINGLE).is_file():
            return {}
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ValueError(
                f"{folder}: holds pickled weights only, which run code when they are read; convert "
                "them to safetensors first"
            )
        raise ValueError(f"{folder}: holds no {_SINGLE} or {_INDEX}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not an index of weights ({error})") from None
    for name, file in pairs.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: {name} is said to be in {file!r}, which is not a file of it")
    if not pairs:
        raise ValueError(f"{path}: names no tensors")
    return pairs


@contextmanager
def _open(folder: Path, file: str) -> Iterator[Any]:
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is truncated or damaged ({error})") from None
    with handle as opened:
        yield opened


def _check_index(folder: Path, index: dict[str, str], files: dict[str, Any]) -> None:
    held = {file: set(handle.keys()) for file, handle in files.items()}
    for name, file in index.items():
        if name not in held[file]:
            raise ValueError(f"{folder / file}: holds no {name}, which {_INDEX} says it does")
    for file, names in held.items():
        for name in sorted(names):
            if index.get(name) != file:
                raise ValueError(f"{folder / file}: holds {name}, which {_INDEX} does not say")
