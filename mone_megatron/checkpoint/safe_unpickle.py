"""Reads pickles of a checkpoint without letting them run anything.

A pickle names functions to call, and unpickling calls them. Three things in a checkpoint are
pickles: ``.metadata`` (read with ``pickle.load``), ``common.pt`` and each sharded object (both
read with ``torch.load``, the latter with its protection off). Here each of them gets only the
classes listed below, none of which does more than hold data.

A manifest does not protect from this: whoever writes a hostile file can write its manifest, too.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import pickle
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import IO, Any, ClassVar, NoReturn, cast

import numpy
import torch

from mone_megatron.checkpoint.errors import UnsafePickleError
from mone_megatron.checkpoint.manifest import is_inside

_CHECKPOINT = "torch.distributed.checkpoint"
# What `.metadata` of torch.distributed.checkpoint, as megatron-core writes it, consists of.
_METADATA_CLASSES = frozenset(
    {
        (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "Metadata"),
        (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
        (f"{_CHECKPOINT}.metadata", "StorageMeta"),
        (f"{_CHECKPOINT}.metadata", "TensorProperties"),
        (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        (f"{_CHECKPOINT}.planner", "BytesIOWriteData"),
        (f"{_CHECKPOINT}.planner", "SavePlan"),
        (f"{_CHECKPOINT}.planner", "TensorWriteData"),
        (f"{_CHECKPOINT}.planner", "WriteItem"),
        (f"{_CHECKPOINT}.planner", "WriteItemType"),
        ("collections", "OrderedDict"),
        # Looks a layout up in a table.
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    }
)
# Beyond torch's own list of tensors, sizes, types and plain containers: arrays of numbers, as in
# NumPy's random state, and the byte streams that some modules keep as extra state. Not among
# them: NumPy's structured and object types, whose pickled state is trusted with raw memory.
_TORCH_GLOBALS: tuple[Any, ...] = (
    numpy.ndarray,
    numpy.dtype,
    numpy.empty(0).__reduce__()[0],
    *{type(numpy.dtype(code)) for code in ("?", "u1", "u4", "u8", "i4", "i8", "f4", "f8")},
    io.BytesIO,
)
_original_torch_load = torch.load
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global")
_BLOCKED_MODULE = re.compile(r"Trying to load unsupported GLOBAL (\S+)")
# Held by whoever changes functions for the process, and torch's list of allowed classes. Two:
# a thread started by a load may load, too.
_functions_lock = threading.RLock()
_globals_lock = threading.RLock()


# The one written in Python: its steps can be overridden.
_PythonUnpickler: Any = pickle._Unpickler


class RestrictedUnpickler(_PythonUnpickler):
    """Unpickles ``.metadata`` of a distributed checkpoint and nothing else."""

    def __init__(self, file: IO[bytes], *, source: str) -> None:
        """Reads nothing yet.

        Args:
            file: where the pickle starts.
            source: names it in messages.
        """
        super().__init__(file)
        self._source = source

    def load(self) -> Any:
        """Returns the object that the pickle holds.

        Raises:
            UnsafePickleError: it needs a class that is not listed, or names files outside.
            ValueError: it is not a whole pickle.
        """
        try:
            loaded = super().load()
            self._check_paths(loaded)
            return loaded
        except UnsafePickleError:
            raise
        # Damaged pickles fail in many ways, and all of them mean the same.
        except Exception as error:
            raise ValueError(
                f"{self._source} is not a readable pickle ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]})"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        """Returns a listed class or a torch data type; refuses all others by name."""
        if (module, name) in _METADATA_CLASSES:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise _refusal(self._source, f"{module}.{name}")

    def load_build(self) -> None:
        """Gives an object its state; refuses to change a class or function that way."""
        if isinstance(self.stack[-2], (type, FunctionType, BuiltinFunctionType)):
            raise _refusal(self._source, f"a change to {self.stack[-2].__qualname__}")
        super().load_build()

    dispatch: ClassVar[dict[int, Any]] = {
        **_PythonUnpickler.dispatch,
        pickle.BUILD[0]: load_build,
    }

    def _check_paths(self, loaded: Any) -> None:
        """Checks that files which the metadata names lie inside the checkpoint."""
        from torch.distributed.checkpoint.metadata import Metadata

        if not isinstance(loaded, Metadata):
            return
        for info in dict(loaded.storage_data or {}).values():
            if not isinstance(info.relative_path, str) or not is_inside(info.relative_path):
                raise UnsafePickleError(
                    f"{self._source} names the file {info.relative_path!r}, which is not inside "
                    "the checkpoint"
                )


def safe_torch_load(path: Path, *, map_location: str = "cpu") -> Any:
    """Loads what ``torch.save`` wrote, if it is tensors, arrays and plain containers of them.

    Raises:
        UnsafePickleError: it needs a class or function that is not listed; nothing was run.
        ValueError: it is not a whole file of ``torch.save``.
    """
    return _load(path, str(path), map_location=map_location)


def load_part(path: Path, *, offset: int, length: int) -> Any:
    """Loads one part of a file as :func:`safe_torch_load` loads a whole one.

    torch.distributed.checkpoint packs many such parts into a file.

    Raises:
        UnsafePickleError: see :func:`safe_torch_load`.
        ValueError: the file ends before the part does, or the part is not one of ``torch.save``.
    """
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    if len(content) != length:
        raise ValueError(f"{path} ends within what should lie at byte {offset}")
    return _load(io.BytesIO(content), str(path), map_location="cpu")


@contextmanager
def restricted_pickle(folder: Path) -> Iterator[None]:
    """Makes this process unpickle only what a checkpoint may hold, within a ``with`` block.

    Put it around ``megatron.core.dist_checkpointing.load`` and whatever else reads a checkpoint.
    It replaces ``pickle.load``, ``pickle.loads``, ``pickle.Unpickler``, ``torch.load`` and
    ``torch.jit.load`` for the whole process, other threads included. Exchange of objects between
    ranks and with loader workers holds its own references and is not affected.

    Args:
        folder: the checkpoint, for messages.

    Raises:
        UnsafePickleError: from the code within, naming the class and the file, on every rank that
            torch.distributed.checkpoint told of it.
    """

    from torch.distributed.checkpoint.api import CheckpointException

    # Some readers go on after a refusal, with nothing, and fail of that.
    refused: list[UnsafePickleError] = []

    class Unpickler(RestrictedUnpickler):
        def __init__(self, file: IO[bytes], **_: Any) -> None:
            super().__init__(file, source=str(getattr(file, "name", folder)))

        def load(self) -> Any:
            try:
                return super().load()
            except UnsafePickleError as error:
                refused.append(error)
                raise

    def load(file: IO[bytes], **_: Any) -> Any:
        return Unpickler(file).load()

    def loads(data: bytes, /, **_: Any) -> Any:
        return Unpickler(io.BytesIO(data)).load()

    def torch_load(f: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return _load(f, _source_of(f, folder), map_location=map_location)

    def jit_load(*_: Any, **__: Any) -> NoReturn:
        raise _refusal(str(folder), "a TorchScript program")

    # Held throughout: interleaved replacements of two threads would restore the wrong functions.
    with _functions_lock, ExitStack() as stack:
        stack.enter_context(_replaced(pickle, "load", load))
        stack.enter_context(_replaced(pickle, "loads", loads))
        stack.enter_context(_replaced(pickle, "Unpickler", Unpickler))
        stack.enter_context(_replaced(torch, "load", torch_load))
        stack.enter_context(_replaced(torch.jit, "load", jit_load))
        try:
            yield
        # What ranks tell each other in torch.distributed.checkpoint; no subclass of Exception.
        except CheckpointException as error:
            for failure, _ in error.failures.values():
                if isinstance(failure, UnsafePickleError):
                    raise failure from error
            if refused:
                raise refused[0] from error
            raise


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = vars(module)[name]
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _load(f: Any, source: str, *, map_location: Any) -> Any:
    with _globals_lock, _only_our_globals():
        try:
            return _original_torch_load(f, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            for pattern in (_REFUSED_GLOBAL, _BLOCKED_MODULE):
                if match := pattern.search(str(error)):
                    raise _refusal(_located(f, source), match[1]) from error
            raise UnsafePickleError(
                f"{_located(f, source)} holds more than tensors and plain values, and is not loaded"
            ) from error
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{_located(f, source)} cannot be loaded ({reason})") from error


@contextmanager
def _only_our_globals() -> Iterator[None]:
    """Allows torch's classes and ours within a ``with`` block, none that libraries added."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(_TORCH_GLOBALS))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refusal(source: str, what: str) -> UnsafePickleError:
    return UnsafePickleError(
        f"{source} wants {what}, which is not on the list of what a checkpoint may hold; nothing "
        "was run"
    )


def _source_of(f: Any, folder: Path) -> str:
    from torch.distributed.checkpoint.utils import _ReaderView

    if isinstance(f, _ReaderView):
        # One tensor's part of a shard.
        f = f.base_stream
    if isinstance(f, (io.BufferedReader, io.FileIO)):
        return str(f.name)
    if isinstance(f, (str, os.PathLike)):
        return os.fspath(cast("str | os.PathLike[str]", f))
    return str(folder)


def _located(f: Any, source: str) -> str:
    """Returns the checkpoint's file that a refused in-memory object came from, else ``source``."""
    folder = Path(source)
    if not isinstance(f, io.BytesIO) or not folder.is_dir():
        return source
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size >= f.getbuffer().nbytes > 0:
            with (
                path.open("rb") as stream,
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                if content.find(f.getvalue()) >= 0:
                    return str(path)
    return source
