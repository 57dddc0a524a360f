"""Stores a routing trace in a folder: which experts and neurons every token of a text used.

``trace.json`` describes the trace and is written last, so that a folder without it is an unfinished
one. Beside it lie the shards, ``shard-00000.npz`` and so on: whole windows of text each, so that
nothing has to be in memory but one layer of one shard. ``docs/analysis.md`` describes the arrays.

Shape suffixes: N tokens of a shard, K experts of a token, B bytes of an expert's kept neurons.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mone_megatron.lab.routing.bits import Bits, packed_bytes
from mone_megatron.whole_files import write_json

HEADER_FILE = "trace.json"
FORMAT, VERSION = "mone_megatron.routing_trace", 1
# What Megatron-LM's trace does not say.
UNKNOWN_TOKEN = -1

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LayerShape:
    """Describes one layer with routed experts.

    Attributes:
        layer: its number, from 1, as in a run's metrics.
        experts: how many there are.
        top_k: experts of a token.
        neurons: neurons of one expert; 0 when the trace holds no neurons.
        kept: neurons that a token keeps in an expert; 0 likewise.
    """

    layer: int
    experts: int
    top_k: int
    neurons: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Selection:
    """Describes how the kept neurons of a trace were chosen.

    Attributes:
        keep_ratio: share of an expert's neurons.
        score: what ranks them (``mone.score``).
        by: ``model`` when the model selects so itself, ``analysis`` when all its neurons take part
            and the trace holds the top share only.
    """

    keep_ratio: float
    score: str
    by: str


@dataclass(frozen=True)
class TraceHeader:
    """Describes what a trace is of.

    Attributes:
        name: the model, for people.
        step: optimizer steps done, of a checkpoint; None otherwise.
        identity: equal for two traces of the same weights: SHA-256, hex.
        layers: the layers with routed experts, ascending.
        domains: names, in the order of their numbers in the shards.
        selection: None when the trace holds no neurons.
        ordered: the experts of a token stand in the order of their weights, largest first.
        weighted: the shards hold the router's weights.
        texts: what the tokens spell, by id, where that is known.
        beginning: how texts began for the model, in words, where that is known.
    """

    name: str
    step: int | None
    identity: str
    layers: tuple[LayerShape, ...]
    domains: tuple[str, ...]
    selection: Selection | None
    ordered: bool = True
    weighted: bool = True
    texts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    beginning: str = ""

    def shape(self, layer: int) -> LayerShape:
        """Returns the shape of the layer of that number."""
        return next(shape for shape in self.layers if shape.layer == layer)


@dataclass(frozen=True)
class Tokens:
    """Holds the text of a shard.

    Attributes:
        ids_N: int32 token ids; all -1 where they are not known.
        windows_N: int32 number of the window that each token stands in, never decreasing.
        domains_N: int32 number of its domain.
    """

    ids_N: Int32Array
    windows_N: Int32Array
    domains_N: Int32Array

    def __len__(self) -> int:
        return len(self.ids_N)


@dataclass(frozen=True)
class Routing:
    """Holds what one layer did with the tokens of a shard.

    Attributes:
        experts_NK: int32 numbers of the experts.
        weights_NK: float32 weights of the router; None when not recorded.
        kept_NKB: bits of the neurons kept in each of them; None when not recorded.
    """

    experts_NK: Int32Array
    weights_NK: npt.NDArray[np.float32] | None
    kept_NKB: Bits | None


class TextDigest:
    """Computes the SHA-256 of a trace's tokens and windows, equal where traces are of one text."""

    def __init__(self) -> None:
        # One each, so that it is the same wherever shards are cut.
        self._ids, self._windows = hashlib.sha256(), hashlib.sha256()
        self._known = True

    def add(self, tokens: Tokens) -> None:
        """Adds the tokens of the next shard."""
        self._ids.update(tokens.ids_N.astype(np.int32).tobytes())
        self._windows.update(tokens.windows_N.astype(np.int32).tobytes())
        self._known &= not (tokens.ids_N == UNKNOWN_TOKEN).any()

    def hexdigest(self, identity: str) -> str:
        """Returns the digest in hex.

        ``identity`` is the trace's: it enters where token ids are not known, so that such a trace
        is of no other's text.
        """
        whole = self._ids.digest() + self._windows.digest()
        return hashlib.sha256(whole + (b"" if self._known else identity.encode())).hexdigest()


class TraceWriter:
    """Writes a trace shard by shard; :meth:`close` finishes it."""

    def __init__(self, folder: Path) -> None:
        """Begins in ``folder``, which is made, or must be empty but for an unfinished trace.

        Raises:
            ValueError: it holds a finished trace or something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / HEADER_FILE).exists():
            raise ValueError(f"{folder}: holds a trace already; give another folder")
        for path in folder.iterdir():
            if not (path.name.startswith("shard-") and path.suffix == ".npz"):
                raise ValueError(f"{folder}: holds {path.name}; give an empty folder for the trace")
            path.unlink()
        self.folder = folder
        self._shards: list[dict[str, Any]] = []
        self._text = TextDigest()

    def add(self, tokens: Tokens, layers: Mapping[int, Routing]) -> None:
        """Writes one shard of whole windows: its text, and each layer by its number."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": tokens.ids_N.astype(np.int32),
            "windows": tokens.windows_N.astype(np.int32),
            "domains": tokens.domains_N.astype(np.uint16),
        }
        for layer, routing in layers.items():
            arrays[f"layer_{layer}.experts"] = routing.experts_NK.astype(np.uint16)
            if routing.weights_NK is not None:
                arrays[f"layer_{layer}.weights"] = routing.weights_NK.astype(np.float32)
            if routing.kept_NKB is not None:
                arrays[f"layer_{layer}.kept"] = routing.kept_NKB
        name = f"shard-{len(self._shards):05d}.npz"
        with (self.folder / name).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self._text.add(tokens)
        size = (self.folder / name).stat().st_size
        self._shards.append({"file": name, "tokens": len(tokens), "bytes": size})

    def close(self, header: TraceHeader) -> Trace:
        """Writes the header and opens what was written.

        Raises:
            ValueError: no tokens were added.
        """
        if not self._shards:
            raise ValueError(f"{header.name}: no tokens were traced; give a text that holds some")
        fields = dataclasses.asdict(header)
        fields["texts"] = {str(token): text for token, text in header.texts.items()}
        document = {
            "format": FORMAT,
            "version": VERSION,
            **fields,
            "text_sha256": self._text.hexdigest(header.identity),
            "shards": self._shards,
        }
        write_json(self.folder / HEADER_FILE, document, indent=1)
        return Trace(self.folder)


class Trace:
    """Reads a finished trace, layer by layer."""

    def __init__(self, folder: Path) -> None:
        """Opens the trace and checks the header and the sizes of all shards.

        Raises:
            ValueError: there is no trace, it is unfinished, of another version, or truncated.
        """
        path = folder / HEADER_FILE
        if not path.is_file():
            unfinished = folder.is_dir() and any(folder.glob("shard-*.npz"))
            reason = "its recording did not finish; record it again" if unfinished else "no trace"
            raise ValueError(f"{folder}: {reason} (no {HEADER_FILE})")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: is damaged ({error}); record it again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path}: is not the header of a routing trace")
        if document.get("version") != VERSION:
            raise ValueError(
                f"{path}: has version {document.get('version')}, this program reads {VERSION}; "
                "record it again"
            )
        self.folder = folder
        try:
            self.header = _header(document)
            self.text_sha256 = str(document["text_sha256"])
            self._shards = [
                (str(one["file"]), int(one["tokens"]), int(one["bytes"]))
                for one in document["shards"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is damaged ({error!r}); record it again") from error
        for name, _, size in self._shards:
            file = folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise ValueError(f"{file}: the trace is truncated: it {state}; record it again")

    @property
    def tokens(self) -> int:
        """Returns how many tokens the whole trace holds."""
        return sum(tokens for _, tokens, _ in self._shards)

    @property
    def size(self) -> int:
        """Returns how many bytes all shards have."""
        return sum(size for _, _, size in self._shards)

    def texts(self) -> Iterator[Tokens]:
        """Yields the text of each shard, in order."""
        for name, _, _ in self._shards:
            arrays = self._read(name, "tokens", "windows", "domains")
            yield Tokens(*(array.astype(np.int32) for array in arrays))

    def routings(self, layer: int) -> Iterator[Routing]:
        """Yields one layer of each shard, in order."""
        shape = self.header.shape(layer)
        keys = ["experts"]
        keys += ["weights"] if self.header.weighted else []
        keys += ["kept"] if shape.neurons else []
        for name, tokens, _ in self._shards:
            arrays = self._read(name, *(f"layer_{layer}.{key}" for key in keys))
            found = dict(zip(keys, arrays, strict=True))
            wanted: dict[str, tuple[int, ...]] = {
                "experts": (tokens, shape.top_k),
                "weights": (tokens, shape.top_k),
            }
            wanted["kept"] = (tokens, shape.top_k, packed_bytes(shape.neurons))
            for key, array in found.items():
                if array.shape != wanted[key]:
                    raise ValueError(
                        f"{self.folder / name}: layer {layer}'s {key} have shape {array.shape}, "
                        f"not {wanted[key]}; record the trace again"
                    )
            experts_NK = found["experts"].astype(np.int32)
            if experts_NK.size and experts_NK.max() >= shape.experts:
                raise ValueError(
                    f"{self.folder / name}: layer {layer} names expert {experts_NK.max()} of "
                    f"{shape.experts}; record the trace again"
                )
            yield Routing(experts_NK, found.get("weights"), found.get("kept"))

    def _read(self, name: str, *keys: str) -> list[npt.NDArray[Any]]:
        path = self.folder / name
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return [arrays[key] for key in keys]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: is damaged ({error}); record the trace again") from error


def check_same_text(first: Trace, second: Trace) -> None:
    """Checks that two traces can be compared token by token.

    Raises:
        ValueError: they are of models of different shapes, or of different texts.
    """
    shapes = [
        [(shape.layer, shape.experts, shape.top_k, shape.neurons) for shape in trace.header.layers]
        for trace in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{second.header.name}: is another model than {first.header.name} (layers, experts, "
            "top-k or neurons differ); analyse them one at a time"
        )
    if first.text_sha256 != second.text_sha256:
        raise ValueError(
            f"{second.header.name}: was traced on another text or in other windows than "
            f"{first.header.name}; record both with the same --text, --seq-length, --max-tokens "
            "and --batch-size"
        )


def _header(document: Mapping[str, Any]) -> TraceHeader:
    selection = document["selection"]
    return TraceHeader(
        name=str(document["name"]),
        step=None if document["step"] is None else int(document["step"]),
        identity=str(document["identity"]),
        layers=tuple(LayerShape(**shape) for shape in document["layers"]),
        domains=tuple(map(str, document["domains"])),
        selection=None if selection is None else Selection(**selection),
        ordered=bool(document["ordered"]),
        weighted=bool(document["weighted"]),
        texts={int(token): str(text) for token, text in document["texts"].items()},
        # Traces of before have none.
        beginning=str(document.get("beginning", "")),
    )
