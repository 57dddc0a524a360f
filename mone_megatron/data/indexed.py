"""Writes Megatron's ``.bin``/``.idx`` files as a stream, and reads them with checks.

The bytes are those of megatron-core's ``IndexedDatasetBuilder`` (a test compares them). They are
written and checked here because this runs before megatron-core may be imported: on CPU its import
has to wait for the redirection of ``torch.cuda``.

Layout of the ``.idx``, little endian: magic (9 bytes), version (uint64, 1), dtype code (uint8),
number of sequences S (uint64), number of document boundaries D (uint64), then lengths (int32, S),
byte offsets in the ``.bin`` (int64, S) and document boundaries (int64, D). The ``.bin`` holds the
tokens of all sequences, one after the other. We write one sequence per document.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 22


def bin_path(prefix: Path) -> Path:
    """Returns the path of a corpus prefix's token file."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Returns the path of a corpus prefix's index file."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Returns the dtype Megatron uses for a vocabulary: uint16 when it fits, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writes documents to a ``.bin`` as they come and the ``.idx`` at the end.

    A context manager: leaving it closes the ``.bin``. The ``.idx`` exists only once
    :meth:`write_index` was called.
    """

    def __init__(self, bin_file: Path, dtype: type[np.integer]) -> None:
        self._stream = bin_file.open("wb")
        self._dtype = dtype
        self._lengths: list[npt.NDArray[np.int32]] = []
        self.documents = 0
        self.tokens = 0
        self.max_token = -1

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def add_documents(self, tokens: npt.NDArray[np.integer], lengths: Sequence[int]) -> None:
        """Appends documents given as one array [sum(lengths)] and the length of each."""
        assert tokens.size == sum(lengths)
        assert all(length > 0 for length in lengths)
        if not lengths:
            return
        largest = int(tokens.max())
        assert int(tokens.min()) >= 0
        assert largest <= np.iinfo(self._dtype).max
        self._stream.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.documents += len(lengths)
        self.tokens += int(tokens.size)
        self.max_token = max(self.max_token, largest)

    def write_index(self, idx_file: Path) -> None:
        """Closes the ``.bin`` and writes the ``.idx``."""
        self._stream.close()
        lengths = np.concatenate([np.zeros(0, dtype=np.int32), *self._lengths])
        sizes = lengths.astype(np.int64) * np.dtype(self._dtype).itemsize
        code = next(code for code, dtype in _DTYPE_CODES.items() if dtype is self._dtype)
        with idx_file.open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, code, self.documents, self.documents + 1))
            stream.write(lengths.tobytes())
            stream.write((np.cumsum(sizes) - sizes).tobytes())
            stream.write(np.arange(self.documents + 1, dtype=np.int64).tobytes())


@dataclass(frozen=True)
class CorpusIndex:
    """Is a checked ``.idx`` and its ``.bin``, both memory-mapped."""

    prefix: Path
    # Tokens per sequence, int32 [sequences].
    lengths: npt.NDArray[np.int32]
    dtype: type[np.integer]
    tokens: int

    @property
    def documents(self) -> int:
        """Returns the number of sequences, which Megatron's GPT datasets split and shuffle."""
        return int(self.lengths.size)

    def split_tokens(self, shares: Sequence[float]) -> list[int]:
        """Returns the tokens in each consecutive share of the documents, cut where Megatron cuts.

        Args:
            shares: the weights of the splits; they need not sum to 1.
        """
        total = sum(shares)
        counts: list[int] = []
        begin = 0.0
        for share in shares:
            end = begin + share / total
            part = self.lengths[round(begin * self.documents) : round(end * self.documents)]
            counts.append(int(part.sum(dtype=np.int64)))
            begin = end
        return counts

    def first_documents(self, count: int, length: int) -> list[tuple[int, ...]]:
        """Returns the first ``length`` tokens of each of the first ``count`` documents.

        Documents that are shorter give fewer.
        """
        tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype)
        lengths = self.lengths[:count].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        return [
            tuple(tokens[start : start + min(length, own)].tolist())
            for start, own in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]

    def max_token(self) -> int:
        """Returns the largest token id, by reading the whole ``.bin``; -1 if any id is negative."""
        tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=self.dtype)
        largest = 0
        for start in range(0, tokens.size, _CHUNK):
            chunk = tokens[start : start + _CHUNK]
            if int(chunk.min()) < 0:
                return -1
            largest = max(largest, int(chunk.max()))
        return largest


def read_index(prefix: Path) -> CorpusIndex:
    """Opens the ``.idx`` of ``prefix`` and checks that it describes the ``.bin`` exactly.

    Raises:
        ValueError: a file is missing, foreign, truncated, empty, or does not fit the other; the
            message starts with the file's name.
    """
    bin_file, idx_file = bin_path(prefix), idx_path(prefix)
    for path in (bin_file, idx_file):
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
    idx_size, bin_size = idx_file.stat().st_size, bin_file.stat().st_size
    with idx_file.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if not header.startswith(_MAGIC[: max(1, len(header))]):
        raise ValueError(f"{idx_file} is not a Megatron index (its first bytes are not MMIDIDX)")
    if len(header) < _HEADER.size:
        raise ValueError(f"{idx_file} is truncated: {idx_size} bytes, shorter than its header")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPE_CODES:
        raise ValueError(
            f"{idx_file} has version {version} and dtype code {code}: not an index of token ids"
        )
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if idx_size != expected:
        state = "truncated" if idx_size < expected else "too long (multimodal or damaged)"
        raise ValueError(f"{idx_file} is {state}: {idx_size} bytes where it declares {expected}")
    if sequences == 0 or bin_size == 0:
        raise ValueError(f"{bin_file} is an empty corpus")

    lengths = np.memmap(idx_file, mode="r", dtype=np.int32, offset=_HEADER.size, shape=(sequences,))
    offsets = np.memmap(
        idx_file, mode="r", dtype=np.int64, offset=_HEADER.size + 4 * sequences, shape=(sequences,)
    )
    last_boundary = np.memmap(
        idx_file, mode="r", dtype=np.int64, offset=idx_size - 8 * min(1, boundaries), shape=(1,)
    )
    dtype = _DTYPE_CODES[code]
    itemsize = np.dtype(dtype).itemsize
    position = 0
    for start in range(0, sequences, _CHUNK):
        sizes = lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        ends = position + np.cumsum(sizes)
        if (sizes < 0).any() or (offsets[start : start + _CHUNK] != ends - sizes).any():
            raise ValueError(f"{idx_file} is damaged: its lengths and offsets disagree")
        position = int(ends[-1])
    if int(last_boundary[0]) != sequences:
        raise ValueError(f"{idx_file} is damaged: its document boundaries do not cover it")
    if position != bin_size:
        state = "truncated" if bin_size < position else "longer than its index says"
        raise ValueError(
            f"{bin_file} is {state}: {bin_size} bytes where {idx_file.name} says {position}"
        )
    return CorpusIndex(prefix=prefix, lengths=lengths, dtype=dtype, tokens=position // itemsize)
