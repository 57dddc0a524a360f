"""Reads and writes a checkpoint's tensors; needs no process group, megatron-core or much memory.

A checkpoint is in the format of torch.distributed.checkpoint, which megatron-core reads and
writes: ``.metadata`` says of each tensor which boxes of it lie where in which file, and each box is
what ``torch.save`` makes of it. :class:`TensorReader` reads any tensor of any layout's checkpoint,
or some rows of it; :class:`TensorWriter` writes a checkpoint that every layout loads. Neither holds
more than one box and what the caller holds.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mone_megatron.checkpoint.reader import Checkpoint
from mone_megatron.checkpoint.safe_unpickle import RestrictedUnpickler, load_part

METADATA_NAME = ".metadata"
# What megatron-core asks of a folder before it loads it.
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """Holds the shape and the dtype that a checkpoint says a tensor has."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Returns the size of the whole tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader:
    """Reads the tensors of one checkpoint, whatever layout wrote it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Reads which tensors there are.

        Args:
            checkpoint: verified; its pickles are read with the allow-list all the same.

        Raises:
            UnsafePickleError: ``.metadata`` holds more than it may.
            ValueError: there is none, or it is not one.
        """
        self.folder = checkpoint.path
        path = self.folder / METADATA_NAME
        try:
            with path.open("rb") as stream:
                metadata = RestrictedUnpickler(stream, source=str(path)).load()
        except FileNotFoundError:
            raise ValueError(f"checkpoint {self.folder} holds no {METADATA_NAME}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} does not describe tensors")
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        # The box that was read last: reading a tensor row by row reads each box once.
        self._last: tuple[MetadataIndex, Tensor] | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Returns the shape and the dtype of every tensor, by name."""
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._tensors.items()
        }

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Reads a whole tensor, or one row: what lies at ``row`` of its first axis.

        Returns:
            The tensor on the CPU, in the dtype it was saved in; a copy of the caller's own.

        Raises:
            ValueError: there is no such tensor, or not all of it is there.
        """
        if name not in self._tensors:
            raise ValueError(f"checkpoint {self.folder} holds no {name}")
        entry = self._tensors[name]
        shape = tuple(entry.size)
        first, last = (0, shape[0]) if row is None else (row, row + 1)
        result = torch.empty((last - first, *shape[1:]), dtype=entry.properties.dtype)
        found = 0
        for chunk in entry.chunks:
            start = max(first, chunk.offsets[0])
            stop = min(last, chunk.offsets[0] + chunk.sizes[0])
            if start >= stop:
                continue
            box = self._box(MetadataIndex(name, chunk.offsets))
            if box.shape != chunk.sizes:
                raise ValueError(
                    f"checkpoint {self.folder}: {name} is {tuple(box.shape)} at "
                    f"{tuple(chunk.offsets)}, not {tuple(chunk.sizes)} as {METADATA_NAME} says"
                )
            part = box[start - chunk.offsets[0] : stop - chunk.offsets[0]]
            inner = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            place = (slice(start - first, stop - first), *(slice(o, o + s) for o, s in inner))
            result[place] = part
            found += part.numel()
        if found != result.numel():
            raise ValueError(
                f"checkpoint {self.folder}: {found} of {result.numel()} elements of {name} are "
                "there"
            )
        return result if row is None else result[0]

    def _box(self, index: MetadataIndex) -> Tensor:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        # Freed before the next one is read.
        self._last = None
        place = self._places.get(index)
        if place is None:
            raise ValueError(f"checkpoint {self.folder}: {index.fqn} lies in no file")
        path = self.folder / place.relative_path
        box = load_part(path, offset=place.offset, length=place.length)
        if not isinstance(box, Tensor):
            raise ValueError(f"{path} holds a {type(box).__name__} where {index.fqn} should be")
        self._last = (index, box)
        return box


class TensorWriter:
    """Writes tensors one by one into a folder that megatron-core loads on any layout."""

    def __init__(self, folder: Path, *, file_bytes: int = 2 << 30) -> None:
        """Takes the folder, which is there and empty; begins a new file every ``file_bytes``."""
        self.folder = folder
        self._file_bytes = file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._stream: IO[bytes] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor."""
        self._add(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)

    def add_row(self, name: str, rows: int, row: int, tensor: Tensor) -> None:
        """Writes what lies at ``row`` of a tensor whose first axis has ``rows``."""
        whole = (rows, *tensor.shape)
        self._add(name, whole, (row, *(0,) * tensor.ndim), tensor.unsqueeze(0))

    def _add(
        self, name: str, whole: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor
    ) -> None:
        index = MetadataIndex(name, torch.Size(offsets))
        assert index not in self._places, f"{name} at {offsets} is written twice"
        entry = self._tensors.setdefault(
            name,
            TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(whole), []),
        )
        assert entry.size == torch.Size(whole), name
        assert entry.properties.dtype is tensor.dtype, name
        if self._stream is None or self._stream.tell() >= self._file_bytes:
            self._next_file()
        assert self._stream is not None
        offset = self._stream.tell()
        # A view would be saved with all of its storage.
        torch.save(tensor.detach().cpu().clone(), self._stream)
        place = _StorageInfo(Path(self._stream.name).name, offset, self._stream.tell() - offset)
        self._places[index] = place
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))

    def finish(self, common: Mapping[str, Any]) -> None:
        """Writes what describes the tensors, and the plain values that belong to no rank."""
        self.close()
        for name, entry in self._tensors.items():
            held = sum(chunk.sizes.numel() for chunk in entry.chunks)
            assert held == entry.size.numel(), f"{name}: {held} of {entry.size.numel()} written"
        metadata = Metadata(dict(self._tensors), storage_data=self._places)
        with (self.folder / METADATA_NAME).open("wb") as stream:
            pickle.dump(metadata, stream)
        torch.save(dict(common), self.folder / "common.pt")
        (self.folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")

    def close(self) -> None:
        """Closes the file that is being written, if any."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _next_file(self) -> None:
        self.close()
        self._stream = (self.folder / f"__0_{self._files}.distcp").open("wb")
        self._files += 1


def different_tensors(ours: TensorReader, theirs: TensorReader, names: Iterator[str]) -> list[str]:
    """Returns those of ``names`` whose tensors are not bitwise equal in both."""
    return [name for name in names if not _same_bits(ours.read(name), theirs.read(name))]


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return (
        ours.dtype is theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    )
