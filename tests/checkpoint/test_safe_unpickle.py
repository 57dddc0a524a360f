"""Hostile pickles in each place of a checkpoint that is unpickled: never run, refused by name."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import random
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mone_megatron.checkpoint import (
    CheckpointStore,
    UnsafePickleError,
    restricted_pickle,
    safe_torch_load,
)
from mone_megatron.checkpoint.safe_unpickle import RestrictedUnpickler
from mone_megatron.megatron_release import megatron_release


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def payloads(marker: Path) -> list[Any]:
    """Objects whose unpickling leaves ``marker`` behind, each its own way."""
    return [
        Call(os.system, f"touch {marker}"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
        Call(os.mkdir, str(marker)),
        Call(getattr, "x", "__class__"),
        Call(__import__, "os"),
        {"lr": 0.1, "deep": [OrderedDict(a=(Call(os.mkdir, str(marker)),))]},
        Call(torch.load, str(marker)),
        Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, str(marker)))),
        Call(copyreg._reconstructor, Path, object, None),
        Call(map, os.mkdir, [str(marker)]),
    ]


def metadata_bytes(relative_path: str = "__0_0.distcp") -> bytes:
    """A small ``.metadata`` such as torch writes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    size = torch.Size([3])
    chunk = ChunkStorageMetadata(torch.Size([0]), size)
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, [chunk])
    index = MetadataIndex("w", torch.Size([0]))
    return pickle.dumps(
        Metadata(
            {"w": tensor, "b": BytesStorageMetadata()},
            storage_data={index: _StorageInfo(relative_path, 0, 10)},
        )
    )


def restricted(content: bytes) -> Any:
    return RestrictedUnpickler(io.BytesIO(content), source=".metadata").load()


def test_metadata_loads() -> None:
    loaded = restricted(metadata_bytes())
    assert loaded == pickle.loads(metadata_bytes())
    assert loaded.state_dict_metadata["w"].properties.dtype is torch.bfloat16


@pytest.mark.parametrize("number", range(12))
def test_hostile_metadata_is_refused(number: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(payloads(marker)[number], protocol=protocol)
        with pytest.raises(UnsafePickleError, match=r"^\.metadata wants [\w.]+, which is not"):
            restricted(content)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        # A dotted name, reaching through a listed module; a stack global; an extension code.
        b"\x80\x04\x8c\x05torch\x8c\x14serialization.os.nah\x93.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        b"ctorch\nload\n.",
        b"ctorch\nfloat32.__class__\n.",
        b"cbuiltins\ngetattr\n.",
        # The same classes under another name for the module they come from.
        b"ctorch.distributed.checkpoint.filesystem\nMetadata\n.",
        # A new attribute for a listed class, and for a listed function.
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x01\x00\x00\x00aK\x01sb.",
        b"ctorch.serialization\n_get_layout\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    ],
)
def test_reaching_around_the_list_is_refused(content: bytes) -> None:
    with pytest.raises(UnsafePickleError, match=r"^\.metadata wants"):
        restricted(content)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "", ".", "a\0b", 7, "a//b"]
)
def test_metadata_naming_files_outside_are_refused(path: Any) -> None:
    with pytest.raises(UnsafePickleError, match="not inside the checkpoint"):
        restricted(metadata_bytes(path))


def test_damaged_metadata_are_a_value_error() -> None:
    whole = metadata_bytes()
    choose = random.Random(5)
    restricted(whole)
    for end in range(0, len(whole), 7):
        with pytest.raises(ValueError, match=r"^\.metadata"):
            restricted(whole[:end])
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        # Some flips change a name or a number and are the manifest's to find.
        with contextlib.suppress(ValueError):
            restricted(bytes(flipped))


def test_plain_state_loads(tmp_path: Path) -> None:
    state = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "numpy": np.random.RandomState(3).get_state(),
        "ids": np.arange(4),
        "python": random.Random(3).getstate(),
        "bytes": io.BytesIO(b"extra"),
        "plain": [1, 2.5, "x", None, True, (1, 2), {3}, b"y"],
        "dtype": torch.float32,
        "ordered": OrderedDict(a=1),
    }
    path = tmp_path / "common.pt"
    torch.save(state, path)
    loaded = safe_torch_load(path)
    assert torch.equal(loaded["weight"], state["weight"])
    assert torch.equal(loaded["half"], state["half"])
    assert (loaded["numpy"][1] == state["numpy"][1]).all()
    assert (loaded["ids"] == state["ids"]).all()
    assert loaded["bytes"].getvalue() == b"extra"
    for key in ("python", "plain", "dtype", "ordered"):
        assert loaded[key] == state[key]


@pytest.mark.parametrize("number", range(12))
def test_hostile_torch_files_are_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With it, torch.load turns its own protection off unless told otherwise.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    for zipped in (True, False):
        path = tmp_path / "common.pt"
        torch.save(payloads(marker)[number], path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UnsafePickleError, match=r"common\.pt (wants|holds)") as caught:
            safe_torch_load(path)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def test_the_refused_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save(Call(os.system, "true"), path)
    with pytest.raises(UnsafePickleError, match=r"common\.pt wants \w+\.system, which"):
        safe_torch_load(path)


def test_what_others_allowed_torch_is_not_allowed_here(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save(Call(os.path.basename, "x"), path)
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([os.path.basename]):
        assert torch.load(path) == "x"
        with pytest.raises(UnsafePickleError, match="basename"):
            safe_torch_load(path)
        assert torch.load(path) == "x"
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_objects_of_numpy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    for array in (np.array([None, {}], dtype=object), np.zeros(2, dtype=[("a", "f4")])):
        torch.save(array, path)
        with pytest.raises(UnsafePickleError, match=r"common\.pt"):
            safe_torch_load(path)


def test_damaged_torch_files_are_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "common.pt"
    torch.save({"a": torch.ones(3)}, path)
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"common\.pt") as caught:
            safe_torch_load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        safe_torch_load(tmp_path / "none.pt")


# The process-wide context


def torchscript(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Module()).save(str(path))


def test_everything_is_restricted_within_and_as_before_after(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Call(os.mkdir, str(marker)))
    torch.save(Call(os.mkdir, str(marker)), tmp_path / "x.pt")
    torchscript(tmp_path / "script.pt")
    before = (pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.jit.load)

    def attempts() -> list[Callable[[], Any]]:
        return [
            lambda: pickle.loads(hostile),
            lambda: pickle.load(io.BytesIO(hostile)),
            lambda: pickle.Unpickler(io.BytesIO(hostile)).load(),
            lambda: torch.load(tmp_path / "x.pt"),
            lambda: torch.load(tmp_path / "x.pt", weights_only=False),
            lambda: torch.load(tmp_path / "x.pt", None, pickle),
            lambda: torch.jit.load(str(tmp_path / "script.pt")),
        ]

    with restricted_pickle(tmp_path):
        for attempt in attempts():
            with pytest.raises(UnsafePickleError):
                attempt()
        with restricted_pickle(tmp_path), pytest.raises(UnsafePickleError):
            pickle.loads(hostile)
        with pytest.raises(UnsafePickleError):
            pickle.loads(hostile)
        with pytest.raises(ValueError, match="TorchScript"):
            torch.load(tmp_path / "script.pt", weights_only=False)
    assert not marker.exists()
    assert before == (pickle.load, pickle.loads, pickle.Unpickler, torch.load, torch.jit.load)
    with pytest.raises(KeyError), restricted_pickle(tmp_path):
        raise KeyError
    assert pickle.load is before[0]
    pickle.loads(hostile)
    assert marker.exists()


def test_threads_do_not_mix_up_the_functions(tmp_path: Path) -> None:
    before = pickle.load

    def use() -> None:
        for _ in range(50):
            with restricted_pickle(tmp_path):
                assert pickle.load is not before

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pickle.load is before


# A real checkpoint of megatron-core


def entries(rng: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    return {
        "w": ShardedTensor.from_rank_offsets("w", torch.arange(12.0).reshape(3, 4)),
        "rng": ShardedObject("rng", rng, (1,), (0,)),
        "step": 3,
        "lr": 1e-3,
    }


def megatron_save(folder: Path, rng: Any, **common: Any) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(exist_ok=True)
    dist_checkpointing.save({**entries(rng), **common}, str(folder))


def megatron_load(folder: Path) -> Any:
    from megatron.core import dist_checkpointing

    targets = entries(None)
    targets["w"].data = torch.zeros(3, 4)
    with restricted_pickle(folder):
        return dist_checkpointing.load(targets, str(folder), strict="raise_all")


@pytest.mark.usefixtures("one_process")
def test_a_megatron_checkpoint_whole_and_hostile(store: CheckpointStore, tmp_path: Path) -> None:
    state = {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.ones(3)}
    partial = store.begin(3)
    megatron_save(partial, state)
    folder = store.commit(partial, {})
    store.open(folder)
    loaded = megatron_load(folder)
    assert torch.equal(loaded["w"], torch.arange(12.0).reshape(3, 4))
    assert loaded["rng"]["python"] == state["python"]
    assert (loaded["step"], loaded["lr"]) == (3, 1e-3)

    marker = tmp_path / "marker"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {".metadata", "metadata.json"} <= set(whole)
    # Later releases keep the common state in the shards, and still read it from this file.
    assert ("common.pt" in whole) is (megatron_release() < (0, 17, 0))
    # In place of the metadata, and of the common state; in a tensor's place in its shard.
    torch.save(Call(os.mkdir, str(marker)), tmp_path / "hostile.pt")
    hostile = (tmp_path / "hostile.pt").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(marker))))
    with pytest.raises(UnsafePickleError, match=r"step_00000003/\.metadata wants \w+\.mkdir"):
        megatron_load(folder)
    (folder / ".metadata").write_bytes(whole[".metadata"])
    (folder / "common.pt").write_bytes(hostile)
    with pytest.raises(UnsafePickleError, match=r"step_00000003/common\.pt wants \w+\.mkdir"):
        megatron_load(folder)
    (folder / "common.pt").unlink()
    if "common.pt" in whole:
        (folder / "common.pt").write_bytes(whole["common.pt"])
    for name in sorted(whole):
        if name.endswith(".distcp"):
            # Each starts with its first item; a zip file is found by its end.
            (folder / name).write_bytes(replace_items(whole[name], hostile))
            with pytest.raises(UnsafePickleError, match=re.escape(f"/{name} ")):
                megatron_load(folder)
            (folder / name).write_bytes(whole[name])
    assert not marker.exists()

    # The common state and a sharded object that were saved hostile.
    for name, hostile_state, common in (
        ("object", {"x": Call(os.mkdir, str(marker))}, {}),
        ("common", state, {"y": Call(os.mkdir, str(marker))}),
    ):
        folder = tmp_path / name
        megatron_save(folder, hostile_state, **common)
        in_shard = name == "object" or not (folder / "common.pt").exists()
        says = r"\.distcp wants \w+\.mkdir" if in_shard else r"common\.pt wants \w+\.mkdir"
        with pytest.raises(UnsafePickleError, match=says):
            megatron_load(folder)
    assert not marker.exists()


def replace_items(shard: bytes, hostile: bytes) -> bytes:
    """A shard of the same length whose last zip file is ``hostile``, stretched to fit."""
    out = io.BytesIO(hostile)
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b""
    filler = max(0, len(shard) - len(out.getvalue()))
    return b"\0" * filler + out.getvalue()[-len(shard) :]
