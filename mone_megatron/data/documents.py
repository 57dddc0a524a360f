"""Reads documents out of JSON lines, plain text, Parquet and Arrow files: all tools' only way.

A format of its own is a file of its own beside this one. Each yields documents and bad records;
here it is decided whether a bad record ends the reading or is left out and counted.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mone_megatron.counting import counted
from mone_megatron.data.arrow_rows import read_arrow
from mone_megatron.data.compression import (
    COMPRESSIONS,
    compression_of,
    decompressed,
    without_compression,
)
from mone_megatron.data.dataset_folders import dataset_files
from mone_megatron.data.encodings import UTF_8, Encoding, check_encoding
from mone_megatron.data.json_lines import read_json_lines
from mone_megatron.data.parquet_rows import read_parquet
from mone_megatron.data.plain_text import read_plain_text
from mone_megatron.data.records import BadRecord, Document
from mone_megatron.data.text_keys import DEFAULT_KEY, TextKeys

Format = Literal["jsonl", "text", "parquet", "arrow"]
OnError = Literal["stop", "skip"]

_EXTENSIONS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Those whose text is in a column.
_TABLES: tuple[Format, ...] = ("parquet", "arrow")
# Those that are bytes of text, in some encoding and perhaps compressed.
_OF_TEXT: tuple[Format, ...] = ("jsonl", "text")


@dataclass(frozen=True)
class InputSettings:
    """Says where the text is inside the input files, and what happens with bad records."""

    # Key of a JSON object that holds its text: one for all files, or by their names.
    json_key: str | TextKeys = DEFAULT_KEY
    # Column of a Parquet or Arrow file that holds the text, likewise.
    column: str | TextKeys = DEFAULT_KEY
    # Of JSON lines and plain text.
    encoding: str = UTF_8
    # Splits a plain text file into documents; None makes each file one document.
    document_separator: str | None = None
    # Reads every file in this format whatever its extension; None goes by the extension.
    format: Format | None = None
    # A bad record ends the reading, or is left out and counted.
    on_error: OnError = "stop"
    # Key or column that names each record's domain; None for none. Plain text has no domains.
    domain: str | None = None

    def __post_init__(self) -> None:
        """Checks.

        Raises:
            ValueError: when an option is wrong; the message names it.
        """
        if self.document_separator == "":
            raise ValueError("--document-separator: is empty; leave it out for a document a file")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"--on-error: {self.on_error!r} is not stop or skip")
        object.__setattr__(self, "encoding", check_encoding(self.encoding))

    def key_of(self, path: Path) -> str:
        """Returns the key, or the column, of the text in a file of JSON, Parquet or Arrow."""
        of_json = file_format(path, self) == "jsonl"
        keys = self.json_key if of_json else self.column
        return keys.of(path) if isinstance(keys, TextKeys) else keys

    def as_facts(self) -> dict[str, Any]:
        """Returns the settings as a corpus keeps them, in values of JSON."""
        return asdict(self)

    def check_keys(self, files: Sequence[Path]) -> None:
        """Checks that what is said of keys and columns is about one of the files.

        Raises:
            ValueError: it is not; the message names the option.
        """
        kinds = {path: file_format(path, self) for path in files}
        for option, keys, of, what, fix in (
            ("--json-key", self.json_key, ("jsonl",), "JSON lines", "--column is for the others"),
            ("--column", self.column, _TABLES, "Parquet or Arrow", "--json-key is for JSON lines"),
        ):
            if not isinstance(keys, TextKeys):
                continue
            own = [path for path in files if kinds[path] in of]
            keys.check(option, own, what=what)
            if not own:
                raise ValueError(f"{option} {keys.default}: no input is {what}; {fix}")


def expand_inputs(patterns: Sequence[str], split: str | None = None) -> list[Path]:
    """Returns the files named by paths and globs, in the patterns' order, each one's files sorted.

    Args:
        patterns: files, quoted globs, and folders of datasets (:mod:`.dataset_folders`).
        split: of the folders; None where each has one only.

    Raises:
        ValueError: a pattern names no file, a folder that is no dataset, or a file named before;
            or there is no such split.
    """
    files: list[Path] = []
    of_datasets = 0
    for pattern in patterns:
        if Path(pattern).is_dir():
            of_dataset = dataset_files(Path(pattern), split)
            if of_dataset is None:
                raise ValueError(
                    f"{pattern} is a folder, and no dataset; name its files, as in "
                    f"'{pattern}/*.jsonl'"
                )
            of_datasets += 1
            files.extend(of_dataset)
            continue
        if Path(pattern).exists():
            found = [Path(pattern)]
        else:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            found = [path for path in found if path.is_file()]
        if not found:
            raise ValueError(f"{pattern}: no such file, and no file matches it as a glob")
        files.extend(found)
    if split is not None and not of_datasets:
        raise ValueError(f"--split {split}: no input is the folder of a dataset; leave it out")
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice among the inputs")
        seen.add(path.resolve())
    return files


def file_format(path: Path, settings: InputSettings) -> Format:
    """Returns the format that ``path`` is read in.

    Raises:
        ValueError: its extension is not known and no format is set.
    """
    if settings.format is not None:
        return settings.format
    name = path.name.lower()
    kind = _EXTENSIONS.get(without_compression(Path(name)).suffix)
    if kind is None or (compression_of(path) and kind not in _OF_TEXT):
        both = [f"{end}{kind}" for kind in COMPRESSIONS for end in (".jsonl", ".txt")]
        known = ", ".join([*_EXTENSIONS, *both])
        raise ValueError(f"{path}: unknown extension; known: {known} (or give --format)")
    return kind


class DocumentReader:
    """Reads files one after the other and keeps count of what it met.

    Attributes:
        documents: how many were read, those without text included.
        bad: records that were left out.
        first_bad: what was wrong with the first of them.
    """

    def __init__(self, settings: InputSettings) -> None:
        self.settings = settings
        self.documents = 0
        self.bad = 0
        self.first_bad = ""
        self._files = self._text_files = self._encoded_files = self._separated_files = 0
        # Files that were read in another encoding and are UTF-8.
        self._utf8_as_well: list[Path] = []

    def read(self, path: Path) -> Iterator[Document]:
        """Yields the documents of one file in order, those without text included.

        Raises:
            ValueError: the file cannot be read as its format, or a record is bad and
                ``on_error`` is ``stop``: one line that names the file and its line, row or row
                group.
        """
        in_file = 0
        for found in self._found(path):
            in_file += 1
            if isinstance(found, BadRecord):
                if self.settings.on_error == "stop":
                    raise ValueError(f"{found.message}; --on-error skip leaves such records out")
                self.first_bad = self.first_bad or found.message
                self.bad += found.records
                continue
            self.documents += 1
            yield found
        self._files += 1
        kind = file_format(path, self.settings)
        self._encoded_files += kind in _OF_TEXT
        if kind == "text":
            self._text_files += 1
            self._separated_files += in_file > 1

    def remarks(self) -> list[str]:
        """Returns what the user is to be told after everything was read: a line for each thing.

        Raises:
            ValueError: when nothing but bad records was read.
        """
        lines = []
        if self.bad and not self.documents:
            raise ValueError(f"nothing but bad records ({self.bad}); the first: {self.first_bad}")
        if self.bad:
            lines.append(f"{counted(self.bad, 'bad record')} skipped; the first: {self.first_bad}")
        encoding = self.settings.encoding
        if encoding != UTF_8 and not self._encoded_files:
            lines.append(
                f"--encoding {encoding}: is for JSON lines and plain text, and of "
                f"{self._files} files none is"
            )
        if self._utf8_as_well:
            lines.append(
                f"--encoding {encoding}: {counted(len(self._utf8_as_well), 'file')} can be read "
                f"as UTF-8 as well, and hardly by chance; the first: {self._utf8_as_well[0]}; "
                "leave it out if the text comes out wrong"
            )
        separator = self.settings.document_separator
        if separator is not None and not self._text_files:
            lines.append(
                f"--document-separator {separator!r}: is for plain text, and of "
                f"{self._files} files none is"
            )
        elif separator is not None and not self._separated_files:
            lines.append(
                f"--document-separator {separator!r}: is in none of {self._text_files} text files; "
                "each was read as one document"
            )
        return lines

    def _found(self, path: Path) -> Iterator[Document | BadRecord]:
        settings = self.settings
        kind = file_format(path, settings)
        if kind == "parquet":
            yield from read_parquet(path, settings.key_of(path), settings.domain)
            return
        if kind == "arrow":
            yield from read_arrow(path, settings.key_of(path), settings.domain)
            return
        if kind == "text" and settings.domain is not None:
            raise ValueError(f"{path}: plain text has no field {settings.domain!r}")
        encoding = Encoding(settings.encoding)
        with path.open("rb") as raw, encoding.naming(path):
            stream = encoding.as_utf8(decompressed(path, raw))
            if kind == "jsonl":
                key = settings.key_of(path)
                yield from read_json_lines(path, raw, stream, encoding, key, settings.domain)
            else:
                assert kind == "text"
                separator = settings.document_separator
                yield from read_plain_text(path, raw, stream, encoding, separator)
        if encoding.is_utf8_as_well:
            self._utf8_as_well.append(path)
