"""Reads text to measure a perplexity on: a run's validation data, a ``.bin``/``.idx`` pair, a file.

Each becomes windows of tokens, int64 ``[L + 1]``: the model reads the first L and predicts the last
L. Documents become tokens and are packed as for training (:mod:`mone_megatron.data.framing`).
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mone_megatron import command_line
from mone_megatron.config.load import from_yaml
from mone_megatron.data.documents import DocumentReader, InputSettings, file_format
from mone_megatron.data.framing import (
    DocumentEncoder,
    Framing,
    framing_of,
    template_opening,
)
from mone_megatron.data.indexed import bin_path, idx_path, read_index
from mone_megatron.data.loader import SampleDataset
from mone_megatron.data.prepare import PreparedData, prepare_data
from mone_megatron.data.sidecar import read_sidecar, tokenizer_path
from mone_megatron.data.tokenizer import load_tokenizer
from mone_megatron.parallel.megatron_compat.importing import import_megatron

Window = npt.NDArray[np.int64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Reader:
    """Describes how a model reads text."""

    tokenizer: PreTrainedTokenizerFast
    # Rows of its embedding: token ids are below.
    vocab_size: int
    # Tokens of one window.
    seq_length: int
    # The special tokens around a document; None follows the tokenizer's own template.
    given_framing: Framing | None = None

    @cached_property
    def framing(self) -> Framing:
        """Returns the special tokens that the model saw around a document."""
        if self.given_framing is not None:
            return self.given_framing
        backend: Tokenizer = self.tokenizer.backend_tokenizer
        return Framing(template_opening(backend), self.tokenizer.eos_token_id)

    @cached_property
    def encoder(self) -> DocumentEncoder:
        """Returns what turns documents into tokens.

        Raises:
            ValueError: the tokenizer names no token that ends a document.
        """
        return DocumentEncoder(self.tokenizer.backend_tokenizer, self.framing)

    @property
    def end_of_text(self) -> int:
        """Returns the id of the token that ends a document.

        Raises:
            ValueError: the tokenizer names none.
        """
        return self.framing.end


class Corpus(Protocol):
    """Is something that a perplexity can be measured on."""

    @property
    def name(self) -> str:
        """Returns what the user called it."""

    def windows(self, reader: Reader, say: Say = command_line.say) -> Sequence[Window]:
        """Returns all of it in order, as windows of tokens.

        Args:
            reader: how the model reads text.
            say: is told what the user should know of the reading.

        Returns:
            Windows of ``[L + 1]`` int64; the last may be shorter.

        Raises:
            ValueError: the model cannot read it: one line.
        """


@dataclass(frozen=True)
class Recorded:
    """Holds a validation loss that a trainer wrote down."""

    step: int
    loss: float


@dataclass(frozen=True)
class RunValidation:
    """Reads the validation samples of a run: what its trainer evaluates, sample for sample."""

    folder: Path

    @property
    def name(self) -> str:
        """Returns the run's folder."""
        return str(self.folder)

    def windows(self, reader: Reader, say: Say = command_line.say) -> Sequence[Window]:
        """Returns the samples of one evaluation, in the trainer's order.

        Windows are as long as in the run; ``reader.seq_length`` is ignored.

        Raises:
            ValueError: the data is not there any more, or the model has another tokenizer.
        """
        config = from_yaml(self.folder / "config.yaml")
        # A run that never evaluated has the split all the same; now it must hold a sample.
        train = dataclasses.replace(config.train, eval_interval=1)
        config = dataclasses.replace(config, train=train)
        prepared = prepare_data(config)
        _check_fingerprint(self.folder, prepared)
        _check_same_tokenizer(self.name, Path(prepared.tokenizer_dir), reader)
        _check_vocabulary(self.name, prepared.vocab_size - 1, reader)
        _tell_other_framing(self.name, prepared.framing, reader, say)
        # megatron-core is only to read data here, so it is imported for no device.
        import_megatron(compile_fused=False)
        from mone_megatron.data.datasets import build_datasets

        _, valid = build_datasets(
            config,
            prepared,
            num_train_samples=train.steps * train.global_batch_size,
            num_valid_samples=train.eval_steps * train.global_batch_size,
            build_here=True,
        )
        assert valid is not None
        return _Samples(valid, train.eval_steps * train.global_batch_size)

    def has_written(self, model: Path) -> bool:
        """Returns whether a model is this run or one of its checkpoints."""
        return model.resolve().is_relative_to(self.folder.resolve())

    def recorded(self, step: int | None = None) -> Recorded | None:
        """Returns the trainer's own loss after ``step``; None when it wrote none.

        Without a step it is the last loss that the trainer wrote.
        """
        found = None
        with (self.folder / "metrics.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # what a killed process was writing
                if "val_loss" in record and step in (None, record["step"]):
                    found = Recorded(int(record["step"]), float(record["val_loss"]))
        return found


class _Samples(Sequence[Window]):
    """Gives samples of the trainer's dataset as windows."""

    def __init__(self, dataset: SampleDataset, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Window:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        sample = self.dataset[index]
        tokens, labels, mask = (
            np.asarray(sample[key]) for key in ("tokens", "labels", "loss_mask")
        )
        assert mask.all(), "the trainer's samples are packed, without padding"
        return np.append(tokens, labels[-1:]).astype(np.int64)


@dataclass(frozen=True)
class IndexedCorpus:
    """Reads all documents of a ``.bin``/``.idx`` pair, in order."""

    prefix: Path

    @property
    def name(self) -> str:
        """Returns the prefix of the pair."""
        return str(self.prefix)

    def windows(self, reader: Reader, say: Say = command_line.say) -> Sequence[Window]:
        """Returns its tokens, each predicted once, in windows as of :func:`windows_of`.

        Raises:
            ValueError: a file is missing or damaged, or the tokens are another tokenizer's.
        """
        index = read_index(self.prefix)
        sidecar = read_sidecar(self.prefix)
        if sidecar is not None:
            _check_same_tokenizer(self.name, self.prefix.parent / sidecar.tokenizer, reader)
        elif tokenizer_path(self.prefix).is_dir():
            _check_same_tokenizer(self.name, tokenizer_path(self.prefix), reader)
        largest = sidecar.max_token if sidecar is not None else index.max_token()
        _check_vocabulary(self.name, largest, reader)
        tokens = np.memmap(bin_path(self.prefix), mode="r", dtype=index.dtype)
        if sidecar is not None:
            made = framing_of(sidecar.framing, eod=sidecar.eod, where=self.name)
            _tell_other_framing(self.name, made, reader, say)
        return windows_of(tokens, reader)


@dataclass(frozen=True)
class TextFile:
    """Reads the documents of a text, JSON-lines or Parquet file."""

    path: Path
    settings: InputSettings

    @property
    def name(self) -> str:
        """Returns the path of the file."""
        return str(self.path)

    def windows(self, reader: Reader, say: Say = command_line.say) -> Sequence[Window]:
        """Returns its tokens by the model's tokenizer, in windows as of :func:`windows_of`.

        Raises:
            ValueError: the file cannot be read or holds no text.
        """
        documents = DocumentReader(self.settings)
        parts = [
            np.asarray(reader.encoder.encode(document.text), dtype=np.int64)
            for document in documents.read(self.path)
        ]
        for remark in documents.remarks():
            say(f"{self.path}: {remark}")
        stream = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        if not stream.size:
            raise ValueError(f"{self.path}: holds no text")
        _check_vocabulary(self.name, int(stream.max()), reader)
        return windows_of(stream, reader)


def open_corpus(where: str, settings: InputSettings | None = None) -> Corpus:
    """Opens a run's folder, the prefix of a ``.bin``/``.idx`` pair, or a file; by what is there.

    Args:
        where: one of the three.
        settings: how a file of text is read; None for the defaults.

    Raises:
        ValueError: there is nothing of the kind, or it is empty.
    """
    path = Path(where)
    if path.is_dir():
        if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
            raise ValueError(
                f"{where}: a folder without config.yaml and metrics.jsonl is no run; give a run, "
                "the prefix of a .bin/.idx pair, or a text file"
            )
        return RunValidation(path)
    if path.suffix in (".bin", ".idx") and path.is_file():
        path = path.with_suffix("")
    if idx_path(path).is_file() or bin_path(path).is_file():
        read_index(path)
        return IndexedCorpus(path)
    if not path.is_file():
        raise ValueError(
            f"{where}: neither a run, the prefix of a .bin/.idx pair, nor a file of text"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: empty")
    settings = settings or InputSettings()
    file_format(path, settings)
    return TextFile(path, settings)


def reads_files(corpora: Sequence[Corpus]) -> bool:
    """Returns whether one of the corpora is a file of text."""
    return any(isinstance(corpus, TextFile) for corpus in corpora)


class _Packed(Sequence[Window]):
    """Gives windows of which each but the first begins with the last token of the one before."""

    def __init__(self, tokens: npt.NDArray[np.integer], length: int, context: int) -> None:
        self.tokens, self.length, self.context = tokens, length, context

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> Window:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.length
        before = self.tokens[first - 1] if index else self.context
        return np.append(np.int64(before), self.tokens[first : first + self.length])


class _Opened(Sequence[Window]):
    """Gives windows that all begin with the opening of a text."""

    def __init__(
        self, tokens: npt.NDArray[np.integer], length: int, opening: tuple[int, ...]
    ) -> None:
        self.tokens, self.length = tokens, length
        self.opening = np.asarray(opening, dtype=np.int64)
        # Where in the stream each window goes on. A document there brings the opening itself.
        self.starts = array("q")
        position = 0
        while position < len(tokens):
            self.starts.append(position)
            own = 0 if self._opens(position) else len(self.opening)
            position += length + 1 - own

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Window:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = self.starts[index]
        last = self.starts[index + 1] if index + 1 < len(self) else len(self.tokens)
        own = self.opening[: 0 if self._opens(first) else None]
        return np.append(own, self.tokens[first:last])

    def _opens(self, position: int) -> bool:
        part = self.tokens[position : position + len(self.opening)]
        return bool(np.array_equal(part, self.opening))


def windows_of(tokens: npt.NDArray[np.integer], reader: Reader) -> Sequence[Window]:
    """Splits a stream of packed documents into windows that begin as texts did in training.

    Where texts begin with a BOS each window does, for models that cannot do without; where they do
    not, the first window begins with the end of a document, and every other one with the last token
    of the one before. Every token of the stream is predicted once, but for the BOS of a document
    that begins a window.

    Args:
        tokens: integers ``[N]``, at least one.
        reader: how the model reads text.

    Returns:
        Windows of ``[L + 1]`` int64; the last may be shorter.

    Raises:
        ValueError: the windows are too short to hold the BOS and a token after it.
    """
    length, framing = reader.seq_length, reader.framing
    if not framing.opening:
        return _Packed(tokens, length, framing.end)
    if length < len(framing.opening):
        raise ValueError(f"--seq-length: {length} has no room for a token after the BOS")
    return _Opened(tokens, length, framing.opening)


def _tell_other_framing(name: str, made: Framing, reader: Reader, say: Say) -> None:
    """Tells where tokens were made with another opening of documents than the model has seen."""
    if made.opening != reader.framing.opening:
        backend = reader.tokenizer.backend_tokenizer
        say(
            f"{name}: in these tokens {made.describe(backend)}, and for the model "
            f"{reader.framing.describe(backend)}"
        )


def _check_vocabulary(name: str, largest: int, reader: Reader) -> None:
    if not 0 <= largest < reader.vocab_size:
        raise ValueError(
            f"{name}: holds token {largest} and the model knows {reader.vocab_size}; "
            "give data made with the model's tokenizer"
        )


def _check_same_tokenizer(name: str, folder: Path, reader: Reader) -> None:
    """Checks that a token id means the same text to the model as to who made the data."""
    theirs = load_tokenizer(folder).tokenizer
    ours: Tokenizer = reader.tokenizer.backend_tokenizer
    # Compared by meaning: saving a tokenizer again changes its file.
    if theirs.get_vocab(with_added_tokens=True) != ours.get_vocab(with_added_tokens=True):
        raise ValueError(
            f"{name}: its tokens were made by {folder}, whose vocabulary is not the model's; "
            "give the text itself instead"
        )


def _check_fingerprint(folder: Path, prepared: PreparedData) -> None:
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if facts.get("data_fingerprint", prepared.fingerprint) != prepared.fingerprint:
        raise ValueError(
            f"{folder}: its data has changed since it was trained (run.json has another "
            "fingerprint); evaluate on a corpus by its prefix instead"
        )
