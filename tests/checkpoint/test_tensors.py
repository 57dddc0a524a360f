"""Tensors of a checkpoint by name, read and written without a process group."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader, load

from mone_megatron.checkpoint import Checkpoint, CheckpointStore, UnsafePickleError
from mone_megatron.checkpoint.tensors import TensorReader, TensorWriter, different_tensors

WHOLE = torch.arange(24.0).view(4, 3, 2)
ROWS = torch.arange(30, dtype=torch.bfloat16).view(5, 6)


def written(folder: Path, *, file_bytes: int = 1 << 20, leave_out: str = "") -> Checkpoint:
    store = CheckpointStore(folder, log=print)
    partial = store.begin(0)
    writer = TensorWriter(partial, file_bytes=file_bytes)
    if leave_out != "whole":
        writer.add("whole", WHOLE)
    for row in range(5):
        writer.add_row("rows", 5, row, ROWS[row])
    writer.finish({"step": 0})
    store.commit(partial, {})
    found = store.newest_verified()
    assert found is not None
    return found


@pytest.mark.parametrize("file_bytes", [1, 2000, 1 << 20])
def test_what_was_written_is_read(tmp_path: Path, file_bytes: int) -> None:
    reader = TensorReader(written(tmp_path, file_bytes=file_bytes))
    assert set(reader.tensors) == {"whole", "rows"}
    assert reader.tensors["rows"].shape == (5, 6)
    assert reader.tensors["rows"].dtype is torch.bfloat16
    assert reader.tensors["rows"].bytes == 60
    assert torch.equal(reader.read("whole"), WHOLE)
    assert torch.equal(reader.read("rows"), ROWS)
    for row in range(4):
        assert torch.equal(reader.read("whole", row), WHOLE[row])
        assert torch.equal(reader.read("rows", row), ROWS[row])


def test_torch_reads_it_too(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, file_bytes=1)
    content = {"whole": torch.zeros(4, 3, 2), "rows": torch.zeros(5, 6, dtype=torch.bfloat16)}
    load(content, storage_reader=FileSystemReader(checkpoint.path), no_dist=True)
    assert torch.equal(content["whole"], WHOLE)
    assert torch.equal(content["rows"], ROWS)


@given(cuts=st.sets(st.integers(1, 5)), row=st.integers(0, 5))
def test_any_boxes_along_both_axes(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], row: int
) -> None:
    """As tensor- and expert-parallel ranks save: boxes of rows and of columns."""
    value = torch.randn(6, 6)
    edges = [0, *sorted(cuts), 6]
    store = CheckpointStore(tmp_path_factory.mktemp("boxes"), log=print)
    partial = store.begin(0)
    writer = TensorWriter(partial)
    for top, bottom in pairwise(edges):
        for left, right in pairwise(edges):
            writer._add("value", (6, 6), (top, left), value[top:bottom, left:right])
    writer.finish({})
    store.commit(partial, {})
    found = store.newest_verified()
    assert found is not None
    reader = TensorReader(found)
    assert torch.equal(reader.read("value"), value)
    assert torch.equal(reader.read("value", row), value[row])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    reader = TensorReader(written(tmp_path))
    with pytest.raises(ValueError, match="holds no other"):
        reader.read("other")


def test_a_part_that_is_not_there_is_told(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    path = checkpoint.path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata["rows"].chunks[2]
    path.write_bytes(pickle.dumps(metadata))
    reader = TensorReader(checkpoint)
    with pytest.raises(ValueError, match="24 of 30 elements of rows are there"):
        reader.read("rows")
    assert torch.equal(reader.read("rows", 1), ROWS[1])


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    path = checkpoint.path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"__0_0.distcp ends within"):
        TensorReader(checkpoint).read("rows")


class _Bomb:
    def __reduce__(self) -> tuple:
        return (print, ("boom",))


def test_pickles_are_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = written(tmp_path)
    path = checkpoint.path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = _Bomb()
    path.write_bytes(pickle.dumps(metadata))
    capsys.readouterr()
    with pytest.raises(UnsafePickleError, match="print"):
        TensorReader(checkpoint)
    assert "boom" not in capsys.readouterr().out


def test_differences_are_named(tmp_path: Path) -> None:
    ours = TensorReader(written(tmp_path / "a"))
    theirs = TensorReader(written(tmp_path / "b"))
    assert different_tensors(ours, theirs, iter(ours.tensors)) == []
    path = theirs.folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    place = content.find(WHOLE[0, 0, 1].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert different_tensors(ours, theirs, iter(ours.tensors)) == ["whole"]
