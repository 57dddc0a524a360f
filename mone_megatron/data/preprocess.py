"""Turns documents into a corpus: Megatron's ``.bin`` and ``.idx``.

Everything is written under temporary names in the target folder, brought to disk and then renamed,
the ``.idx`` last: a corpus that has an ``.idx`` is whole.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mone_megatron.data import sidecar as sidecars
from mone_megatron.data.documents import DocumentReader, InputSettings, file_format
from mone_megatron.data.files import quick_digest, sha256_file, sync_file
from mone_megatron.data.framing import BosChoice, DocumentEncoder, Framing, choose_framing
from mone_megatron.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from mone_megatron.data.progress import ByteProgress
from mone_megatron.data.records import Document
from mone_megatron.data.tokenizer import (
    copy_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from mone_megatron.helpers import unwinding_on_sigterm
from mone_megatron.ownership import owned_path
from mone_megatron.worker_processes import WorkerProcesses

# A chunk goes to a worker when it holds this many characters or documents. Where chunks end does
# not show in the output.
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_DOCUMENTS = 1024


@dataclass(frozen=True)
class TokenizerSettings:
    """Says which tokenizer turns text into ids: a folder, or one to train. Exactly one is set."""

    # A Hugging Face tokenizer folder.
    folder: Path | None = None
    # Trains a byte-level BPE of this size on the input.
    train_vocab_size: int | None = None
    # Training reads documents until this many MB of text; 0 for all.
    train_megabytes: float = 0.0
    # The token that ends a document; None takes the one the folder names.
    eod_token: str | None = None
    # Turns special tokens spelled out in the text into their ids. Otherwise they are text, so that
    # no document can end itself.
    parse_special_tokens: bool = False
    # Whether documents begin with a BOS: as the tokenizer's own template does, always, or never.
    bos: BosChoice = "auto"

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.train_vocab_size is None):
            raise ValueError("give either a tokenizer folder or a vocabulary size to train")
        if self.folder is None and self.eod_token is not None:
            raise ValueError("--eod-token needs --tokenizer: a trained one has its own")
        if self.folder is None and self.bos == "always":
            raise ValueError("--bos always needs --tokenizer: a trained one has no BOS")


@dataclass(frozen=True)
class CorpusSummary:
    """Describes the corpus that was written."""

    prefix: Path
    documents: int
    tokens: int
    skipped_empty: int
    vocab_size: int
    # How documents begin, in words.
    beginning: str
    # What the user is to be told of the reading, a line for each thing.
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _EncodedChunk:
    # Ids of all documents one after the other, each with the special tokens around it.
    tokens: npt.NDArray[np.integer]
    lengths: list[int]
    skipped_empty: int


@dataclass(frozen=True)
class _Encoding:
    folder: Path
    framing: Framing
    dtype: type[np.integer]


def preprocess_files(
    files: Sequence[Path],
    prefix: Path,
    tokenizer: TokenizerSettings,
    *,
    inputs: InputSettings | None = None,
    workers: int = 1,
    overwrite: bool = False,
    read_as: Mapping[str, Any] | None = None,
) -> CorpusSummary:
    """Tokenizes files into the corpus ``prefix``; the order of documents is that of the files.

    Args:
        files: see :func:`mone_megatron.data.documents.expand_inputs`.
        prefix: output path without extension. Beside ``.bin`` and ``.idx`` it gets ``.meta.json``
            and the folder ``.tokenizer``.
        tokenizer: which tokenizer to use or train.
        inputs: where the text is inside the files.
        workers: how many processes tokenize; the output does not depend on it.
        overwrite: whether an existing corpus is replaced.
        read_as: what else the corpus is to say of how it was read, such as the split.

    Raises:
        ValueError: bad input (file and line named), an empty corpus, or an existing one.
    """
    inputs = inputs or InputSettings()
    for path in files:
        file_format(path, inputs)
    inputs.check_keys(files)
    total = sum(path.stat().st_size for path in files)
    remarks: list[str] = []

    def documents() -> Iterator[Document]:
        reader = DocumentReader(inputs)
        for path in files:
            yield from reader.read(path)
        remarks[:] = reader.remarks()

    # Stopped, the tool ends its processes and leaves nothing half made.
    with unwinding_on_sigterm():
        summary = write_corpus(
            documents,
            prefix,
            tokenizer,
            total_bytes=total,
            workers=workers,
            overwrite=overwrite,
            reading={**inputs.as_facts(), "files": len(files), **(read_as or {})},
        )
    return replace(summary, remarks=tuple(remarks))


def write_corpus(
    documents: Callable[[], Iterable[Document]],
    prefix: Path,
    tokenizer: TokenizerSettings,
    *,
    total_bytes: int,
    workers: int = 1,
    overwrite: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> CorpusSummary:
    """Tokenizes documents into the corpus ``prefix``; see :func:`preprocess_files`.

    Args:
        documents: starts reading the documents anew (training a tokenizer reads them first).
        prefix: output path without extension.
        tokenizer: which tokenizer to use or train.
        total_bytes: sum of the documents' ``bytes_read``, for progress.
        workers: how many processes tokenize.
        overwrite: whether an existing corpus is replaced.
        reading: how the documents were read, for the corpus to say; None for nothing.
    """
    if workers < 1:
        raise ValueError("--workers must be at least 1")
    if not prefix.name:
        raise ValueError("the output must be a path prefix, as in 'corpora/books'")
    with owned_path("--output", prefix):
        finals = (idx_path, bin_path, sidecars.sidecar_path, sidecars.tokenizer_path)
        present = [name(prefix) for name in finals if name(prefix).exists()]
        if present and not overwrite:
            raise ValueError(f"{present[0]} exists; give another output or --overwrite")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        # Renames are atomic only within a file system, so the work is done in the target folder.
        work = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=f".{prefix.name}.building-"))
        try:
            return _build(
                documents, prefix, work / prefix.name, tokenizer, total_bytes, workers, reading
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _build(
    documents: Callable[[], Iterable[Document]],
    prefix: Path,
    draft: Path,
    settings: TokenizerSettings,
    total_bytes: int,
    workers: int,
    reading: Mapping[str, Any] | None,
) -> CorpusSummary:
    """Builds the corpus at the prefix ``draft`` and moves it to ``prefix``."""
    folder = sidecars.tokenizer_path(draft)
    _provide_tokenizer(documents, settings, folder)
    loaded = load_tokenizer(folder)
    framing = choose_framing(
        loaded,
        bos=settings.bos,
        eod_token=settings.eod_token,
        parse_special_tokens=settings.parse_special_tokens,
    )
    encoding = _Encoding(folder, framing, dtype=token_dtype(loaded.vocab_size))
    skipped = 0
    with (
        IndexedWriter(bin_path(draft), encoding.dtype) as writer,
        ByteProgress("tokenizing", total_bytes) as progress,
    ):
        for chunk, bytes_read in _encode(documents(), encoding, workers):
            writer.add_documents(chunk.tokens, chunk.lengths)
            skipped += chunk.skipped_empty
            progress.add(bytes_read)
        if writer.documents == 0:
            raise ValueError(f"the corpus is empty: {skipped} documents read, all without text")
        writer.write_index(idx_path(draft))
    sidecar = sidecars.Sidecar(
        format=sidecars.FORMAT,
        vocab_size=loaded.vocab_size,
        eod=framing.end,
        max_token=writer.max_token,
        tokens=writer.tokens,
        documents=writer.documents,
        bin_bytes=bin_path(draft).stat().st_size,
        bin_sha256=sha256_file(bin_path(draft)),
        bin_quick_digest=quick_digest(bin_path(draft)),
        idx_bytes=idx_path(draft).stat().st_size,
        idx_sha256=sha256_file(idx_path(draft)),
        tokenizer=sidecars.tokenizer_path(prefix).name,
        tokenizer_sha256=loaded.sha256,
        framing=framing.as_facts(),
        reading=None if reading is None else dict(reading),
    )
    sidecars.sidecar_path(draft).write_text(sidecars.dump_sidecar(sidecar), encoding="utf-8")
    _publish(draft, prefix)
    return CorpusSummary(
        prefix=prefix,
        documents=writer.documents,
        tokens=writer.tokens,
        skipped_empty=skipped,
        vocab_size=loaded.vocab_size,
        beginning=framing.describe(loaded.tokenizer),
    )


def _publish(draft: Path, prefix: Path) -> None:
    """Moves a finished corpus to its final names; at no moment does a mixture have an .idx."""
    tokenizer = sidecars.tokenizer_path(draft)
    for path in [*tokenizer.iterdir(), tokenizer, *(p for p in draft.parent.iterdir())]:
        sync_file(path)
    idx_path(prefix).unlink(missing_ok=True)
    sync_file(prefix.parent)
    final_tokenizer = sidecars.tokenizer_path(prefix)
    if final_tokenizer.exists():
        shutil.rmtree(final_tokenizer)
    tokenizer.rename(final_tokenizer)
    for name in (bin_path, sidecars.sidecar_path, idx_path):
        name(draft).replace(name(prefix))
    sync_file(prefix.parent)


def _provide_tokenizer(
    documents: Callable[[], Iterable[Document]], settings: TokenizerSettings, folder: Path
) -> None:
    """Trains the tokenizer into ``folder``, or copies the one to use there."""
    if settings.train_vocab_size is not None:
        texts = _first_megabytes(documents(), settings.train_megabytes)
        save_tokenizer(train_tokenizer(texts, settings.train_vocab_size), folder)
        return
    assert settings.folder is not None
    # Whether its special tokens will do, before anything is copied or read.
    choose_framing(load_tokenizer(settings.folder), bos=settings.bos, eod_token=settings.eod_token)
    copy_tokenizer(settings.folder, folder)


def _first_megabytes(documents: Iterable[Document], megabytes: float) -> Iterator[str]:
    taken = 0
    for document in documents:
        if document.text.strip():
            yield document.text
            taken += len(document.text.encode("utf-8", errors="surrogatepass"))
            if megabytes and taken >= megabytes * 1e6:
                return


def _encode(
    documents: Iterable[Document], encoding: _Encoding, workers: int
) -> Iterator[tuple[_EncodedChunk, int]]:
    """Yields encoded chunks in the order of the documents, each with the bytes read for it."""
    chunks = _chunks(documents)
    if workers == 1:
        for texts, bytes_read in chunks:
            yield _encode_chunk(encoding, texts), bytes_read
        return
    bytes_of: deque[int] = deque()

    def texts_of_chunks() -> Iterator[list[str]]:
        for texts, bytes_read in chunks:
            bytes_of.append(bytes_read)
            yield texts

    with WorkerProcesses(
        functools.partial(_encode_chunk, encoding),
        workers,
        one="a tokenizing process (--workers)",
        many=f"{workers} tokenizing processes (--workers)",
        otherwise="--workers 1 tokenizes in one process",
    ) as processes:
        for chunk in processes.results(texts_of_chunks()):
            yield chunk, bytes_of.popleft()


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    texts: list[str] = []
    characters = bytes_read = 0
    for document in documents:
        texts.append(document.text)
        characters += len(document.text)
        bytes_read += document.bytes_read
        if characters >= _CHUNK_CHARACTERS or len(texts) >= _CHUNK_DOCUMENTS:
            yield texts, bytes_read
            texts, characters, bytes_read = [], 0, 0
    if texts:
        yield texts, bytes_read


@functools.lru_cache(maxsize=1)
def _worker_encoder(folder: Path, framing: Framing) -> DocumentEncoder:
    """Returns the encoder of this process, loaded once."""
    return DocumentEncoder(load_tokenizer(folder).tokenizer, framing)


def _encode_chunk(encoding: _Encoding, texts: list[str]) -> _EncodedChunk:
    encoder = _worker_encoder(encoding.folder, encoding.framing)
    parts: list[npt.NDArray[np.integer]] = []
    skipped = 0
    for text in texts:
        ids = encoder.encode(text)
        if ids:
            parts.append(np.array(ids, dtype=encoding.dtype))
        else:
            skipped += 1
    tokens = np.concatenate([np.zeros(0, dtype=encoding.dtype), *parts])
    return _EncodedChunk(tokens, [part.size for part in parts], skipped)
