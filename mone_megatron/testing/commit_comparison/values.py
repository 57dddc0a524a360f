"""Reads what a version left on disk as flat values by name: exact numbers, arrays as SHA-256.

The order of the names is the order in which differences are looked for: losses first.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

Scalar = float | int | str | bool | None
Values = dict[str, Scalar]

# Measured by a clock, made anew by every run, or the streams of Python and NumPy, which a run saves
# as it finds them but does not seed.
_OF_THE_MOMENT = re.compile(
    r"(^|_)seconds$|_per_second$|^tflops_|^started$|^saved_at$|^serial$"
    r"|^(python|numpy)_(words|rest|gauss)$"
)
_OF_RUN_JSON = frozenset({"id", "hardware", "versions"})
# Of an export: code and prose, which a refactor may change. The logits tell what the code computes.
_NOT_COMPUTED = (".py", ".md")


def run_values(run: Path) -> Values:
    """Returns all that a finished run recorded and saved.

    Args:
        run: its ``run.dir``.

    Raises:
        OSError: a file is missing.
        ValueError: a file cannot be read, or the run did not complete.
    """
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    if facts["status"] != "completed":
        raise ValueError(f"{run.name} did not complete: {facts['status']}")
    values: Values = {}
    for record in _json_lines(run / "metrics.jsonl"):
        step = record.pop("step")
        values |= flatten(f"step {step}", record)
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        values |= checkpoint_values(checkpoint)
    for name in ("panel.jsonl", "alerts.jsonl"):
        for number, record in enumerate(_json_lines(run / name), start=1):
            values |= flatten(f"{name} line {number}", record)
    told = {name: fact for name, fact in facts.items() if name not in _OF_RUN_JSON}
    values |= flatten("run.json", told)
    values |= file_values(run / "config.yaml", "config.yaml")
    return values


def newest_checkpoint(run: Path) -> Path | None:
    """Returns the checkpoint of the last step that was saved; None when there is none."""
    return max((run / "checkpoints").glob("step_*"), default=None)


def checkpoint_values(checkpoint: Path) -> Values:
    """Returns the digest of the whole state of a checkpoint, and of each thing in it.

    Weights, masters and moments are compared by name, whatever files they lie in.
    """
    reader = FileSystemReader(checkpoint)
    with warnings.catch_warnings():
        # That this is one process, which is meant.
        warnings.simplefilter("ignore", UserWarning)
        loaded: dict[str, Any] = _load_state_dict_from_keys(None, storage_reader=reader)
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    parts = {key: _digest(tensors[key]) for key in sorted(tensors)}
    whole = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    values: Values = {"state, SHA-256": whole}
    values |= {f"state {key}": digest for key, digest in parts.items()}
    others = {key: loaded[key] for key in sorted(loaded.keys() - tensors.keys())}
    values |= flatten("checkpoint", others)
    # From 0.19 megatron-core keeps it among the others.
    if (checkpoint / "common.pt").exists():
        common = torch.load(checkpoint / "common.pt", weights_only=False)
        values |= flatten("checkpoint common.pt", common)
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["manifest"]
    manifest["facts"].pop("megatron-core", None)  # a version, like those of run.json
    # Its files are those whose contents were just read.
    values |= flatten("checkpoint manifest", {k: v for k, v in manifest.items() if k != "files"})
    for path in sorted((checkpoint / "tokenizer").iterdir()):
        values |= file_values(path, f"checkpoint tokenizer/{path.name}")
    return values


def folder_values(folder: Path) -> Values:
    """Returns what the files of a folder say, but code, prose, pictures and pages."""
    values: Values = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix not in (*_NOT_COMPUTED, ".png", ".html"):
            values |= file_values(path, path.relative_to(folder).as_posix())
    assert values, f"{folder} holds nothing to compare"
    return values


def file_values(path: Path, name: str) -> Values:
    """Returns what one file says: its leaves, arrays or columns where it has such, else its bytes.

    Args:
        path: the file.
        name: what the names of its values begin with.
    """
    if path.suffix == ".json" and not path.name.startswith("tokenizer"):
        return flatten(name, json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".yaml":
        return flatten(name, yaml.safe_load(path.read_text(encoding="utf-8")))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {f"{name} {key}": _digest(arrays[key]) for key in sorted(arrays)}
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return {
            f"{name} {column}": _sha256(repr(table.column(column).to_pylist()).encode())
            for column in table.column_names
        }
    return {name: f"{path.stat().st_size} bytes, SHA-256 {_sha256(path.read_bytes())}"}


def flatten(name: str, value: Any) -> Values:
    """Returns the leaves of nested objects by name; what a clock measured is left out.

    Args:
        name: of the whole.
        value: mappings, sequences, arrays and plain values.
    """
    return dict(_leaves(name, value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not _OF_THE_MOMENT.search(str(key)):
                yield from _leaves(f"{name} {key}".strip(), part)
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield name, _digest(value)
    elif isinstance(value, bytes | io.BytesIO):
        yield name, _sha256(value if isinstance(value, bytes) else value.getvalue())
    elif value is None or isinstance(value, bool | int | float | str):
        yield name, value
    elif isinstance(value, Sequence):
        if not value:
            yield name, "empty"
        for number, part in enumerate(value):
            yield from _leaves(f"{name}[{number}]", part)
    else:
        raise ValueError(f"{name}: a {type(value).__name__} has no values to compare")


def _digest(array: torch.Tensor | np.ndarray[Any, Any]) -> str:
    """Returns the type, shape and SHA-256 of the bytes of an array."""
    if isinstance(array, torch.Tensor):
        content = array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        content = np.ascontiguousarray(array).tobytes()
    kind = str(array.dtype).removeprefix("torch.")
    return f"{kind}{list(array.shape)} SHA-256 {_sha256(content)}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file; none when it is not there: a run without any makes none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
