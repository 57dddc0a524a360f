from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.data import files
from mone_megatron.data.files import quick_digest, sha256_file
from mone_megatron.data.indexed import (
    CorpusIndex,
    IndexedWriter,
    bin_path,
    idx_path,
    read_index,
    token_dtype,
)


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> None:
    with IndexedWriter(bin_path(prefix), dtype) as writer:
        tokens = np.array([token for document in documents for token in document], dtype=np.int64)
        writer.add_documents(tokens, [len(document) for document in documents])
        writer.write_index(idx_path(prefix))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (70000, np.int32)])
def test_dtype_and_max_token(tmp_path: Path, vocab_size: int, dtype: type[np.integer]) -> None:
    assert token_dtype(vocab_size) is dtype
    write(tmp_path / "c", [[1, vocab_size - 1], [0]], dtype)
    index = read_index(tmp_path / "c")
    assert index.dtype is dtype
    assert (index.tokens, index.documents, index.max_token()) == (3, 2, vocab_size - 1)


def test_negative_tokens_are_seen(tmp_path: Path) -> None:
    write(tmp_path / "c", [[1, 2]], np.int32)
    np.array([1, -1], dtype=np.int32).tofile(bin_path(tmp_path / "c"))
    assert read_index(tmp_path / "c").max_token() == -1


def damage(path: Path, position: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(bytes(data))


def test_refuses_damage(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    write(prefix, [[1, 2, 3], [4, 5], [6]])
    good_bin, good_idx = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_index(prefix)
        bin_path(prefix).write_bytes(good_bin)
        idx_path(prefix).write_bytes(good_idx)

    bin_path(prefix).write_bytes(good_bin[:-2])
    refused("c.bin is truncated: 10 bytes where c.idx says 12")
    bin_path(prefix).write_bytes(good_bin + b"xx")
    refused("c.bin is longer than its index says")
    bin_path(prefix).write_bytes(b"")
    refused("c.bin is an empty corpus")
    idx_path(prefix).write_bytes(b"")
    refused("c.idx is not a Megatron index")
    idx_path(prefix).write_bytes(b"PK\x03\x04" + good_idx[4:])
    refused("c.idx is not a Megatron index")
    idx_path(prefix).write_bytes(good_idx[:20])
    refused("c.idx is truncated")
    idx_path(prefix).write_bytes(good_idx[:-1])
    refused("c.idx is truncated")
    idx_path(prefix).write_bytes(good_idx + bytes(3))
    refused("c.idx is too long")
    damage(idx_path(prefix), 17, b"\x07")
    refused("dtype code 7")
    damage(idx_path(prefix), 34, b"\x02")
    refused("lengths and offsets disagree")
    damage(idx_path(prefix), len(good_idx) - 8, b"\x02")
    refused("document boundaries")
    idx_path(prefix).unlink()
    refused("c.idx does not exist")
    assert read_index(prefix).tokens == 6


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.tuples(*[st.floats(0, 1)] * 3).filter(lambda shares: sum(shares) > 0.01),
)
def test_split_cuts_where_megatron_cuts(lengths: list[int], shares: tuple[float, ...]) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
    )
    from megatron.core.datasets.utils import normalize

    array = np.array(lengths, dtype=np.int32)
    index = CorpusIndex(Path("c"), array, np.uint16, int(array.sum()))
    expected = []
    for bounds in convert_split_vector_to_split_matrix(normalize(list(shares))):
        begin, end = bounds or (0.0, 0.0)
        count = float(len(lengths))
        expected.append(int(array[round(begin * count) : round(end * count)].sum()))
    assert index.split_tokens(shares) == expected


def test_quick_digest_samples_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    content = bytearray(np.random.default_rng(0).bytes(9 << 20))
    path.write_bytes(content)
    assert quick_digest(path) == sha256_file(path)
    monkeypatch.setattr(files, "FULL_DIGEST_BYTES", 1 << 20)
    before = quick_digest(path)
    assert before != sha256_file(path)
    assert before == quick_digest(path)
    for position in (0, len(content) - 1):
        changed = content.copy()
        changed[position] ^= 1
        path.write_bytes(changed)
        assert quick_digest(path) != before
