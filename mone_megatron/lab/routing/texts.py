"""Gives what models read while their routing is recorded: windows of text, by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mone_megatron import command_line
from mone_megatron.data.documents import DocumentReader, InputSettings
from mone_megatron.evaluation.corpora import (
    Reader,
    Say,
    TextFile,
    Window,
    open_corpus,
    windows_of,
)
from mone_megatron.lab.routing.record import Batch

# Beyond these the figures cannot be told apart.
MAX_DOMAINS = 64


@dataclass(frozen=True)
class Text:
    """Describes what to read, by domain.

    Attributes:
        places: runs, prefixes of ``.bin``/``.idx`` pairs and files, each a domain of its own.
        documents: where the text lies in the files, and how they are read.
        domain_field: key or column whose values are the domains instead; None for none.
    """

    places: Sequence[str]
    documents: InputSettings
    domain_field: str | None = None

    def check(self) -> None:
        """Checks that everything is there, before anything slow.

        Raises:
            ValueError: naming what is not there.
        """
        for place in self.places:
            corpus = open_corpus(place, self.documents)
            if self.domain_field is not None and not isinstance(corpus, TextFile):
                raise ValueError(
                    f"--domain-field: {place} is not a file of JSON lines or Parquet, and has no "
                    "fields; leave the option out"
                )

    def domains(
        self, reader: Reader, max_tokens: int, say: Say = command_line.say
    ) -> dict[str, Sequence[Window]]:
        """Returns the windows of each domain, each ``[L + 1]`` as :mod:`.corpora` gives them.

        Args:
            reader: the model.
            max_tokens: tokens to read of each domain, at least.
            say: is told what the user should know of the reading.

        Raises:
            ValueError: something cannot be read, or holds no text.
        """
        if self.domain_field is not None:
            return _by_field(self, self.domain_field, reader, max_tokens, say)
        names = [Path(place).stem for place in self.places]
        if len(set(names)) < len(names):
            names = list(self.places)
        return {
            name: open_corpus(place, self.documents).windows(reader, say)
            for name, place in zip(names, self.places, strict=True)
        }


def _by_field(
    text: Text, field: str, reader: Reader, max_tokens: int, say: Say
) -> dict[str, Sequence[Window]]:
    streams: dict[str, list[int]] = {}
    documents = DocumentReader(replace(text.documents, domain=field))
    for place in text.places:
        for document in documents.read(Path(place)):
            assert document.domain is not None
            stream = streams.setdefault(document.domain, [])
            if len(streams) > MAX_DOMAINS:
                raise ValueError(
                    f"--domain-field: {field!r} has more than {MAX_DOMAINS} values in {place}; "
                    "give a field with few"
                )
            if len(stream) <= max_tokens:
                stream += reader.encoder.encode(document.text)
    for remark in documents.remarks():
        say(remark)
    full = {name: np.asarray(ids, np.int64) for name, ids in streams.items() if ids}
    if not full:
        raise ValueError(f"{', '.join(text.places)}: hold no text")
    return {name: windows_of(ids, reader) for name, ids in sorted(full.items())}


def batches_of(
    domains: Sequence[Sequence[Window]], *, max_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """Yields what the models read of each domain: windows without the token that follows each.

    Args:
        domains: from :meth:`Text.domains`.
        max_tokens: tokens to read of each domain, at most.
        batch_size: windows in a batch; fewer where their lengths differ.
    """
    for number, windows in enumerate(domains):
        room = max_tokens
        waiting: list[Window] = []
        for window in windows:
            ids = window[:-1][:room]
            if waiting and (len(waiting) == batch_size or len(ids) != len(waiting[0])):
                yield Batch(np.stack(waiting), number)
                waiting = []
            if not len(ids):
                break
            waiting.append(ids)
            room -= len(ids)
        if waiting:
            yield Batch(np.stack(waiting), number)
