"""What models read while their routing is recorded: windows of text, by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mone_megatron.analysis.routing.record import Batch
from mone_megatron.data.documents import InputSettings, read_documents
from mone_megatron.evaluation.corpora import Reader, TextFile, Window, open_corpus

# Beyond these the figures cannot be told apart.
MAX_DOMAINS = 64


@dataclass(frozen=True)
class Text:
    """What to read, by domain.

    Attributes:
        places: runs, prefixes of ``.bin``/``.idx`` pairs and files, each a domain of its own.
        documents: where the text lies in JSON lines and Parquet files.
        domain_field: key or column whose values are the domains instead; None for none.
    """

    places: Sequence[str]
    documents: InputSettings
    domain_field: str | None = None

    def check(self) -> None:
        """Look whether everything is there, before anything slow.

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

    def domains(self, reader: Reader, max_tokens: int) -> dict[str, Sequence[Window]]:
        """Windows of each domain, each ``[L + 1]`` as :mod:`.corpora` gives them.

        Raises:
            ValueError: something cannot be read, or holds no text.
        """
        if self.domain_field is not None:
            return _by_field(self, self.domain_field, reader, max_tokens)
        names = [Path(place).stem for place in self.places]
        if len(set(names)) < len(names):
            names = list(self.places)
        return {
            name: open_corpus(place, self.documents).windows(reader)
            for name, place in zip(names, self.places, strict=True)
        }


def _by_field(
    text: Text, field: str, reader: Reader, max_tokens: int
) -> dict[str, Sequence[Window]]:
    values = InputSettings(json_key=field, column=field)
    begin = reader.tokenizer.bos_token_id
    first = reader.end_of_text if begin is None else int(begin)
    streams: dict[str, list[int]] = {}
    for place in text.places:
        path = Path(place)
        pairs = zip(read_documents(path, text.documents), read_documents(path, values), strict=True)
        for document, domain in pairs:
            stream = streams.setdefault(domain.text, [first])
            if len(streams) > MAX_DOMAINS:
                raise ValueError(
                    f"--domain-field: {field!r} has more than {MAX_DOMAINS} values in {place}; "
                    "give a field with few"
                )
            if document.text and len(stream) <= max_tokens:
                stream += reader.tokenizer.encode(document.text, add_special_tokens=False)
                stream.append(reader.end_of_text)
    full = {name: np.asarray(ids, np.int64) for name, ids in streams.items() if len(ids) > 1}
    if not full:
        raise ValueError(f"{', '.join(text.places)}: hold no text")
    length = reader.seq_length
    return {
        name: [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
        for name, ids in sorted(full.items())
    }


def batches_of(
    domains: Sequence[Sequence[Window]], *, max_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """What the models read of each domain: windows without the token that follows each.

    Args:
        domains: from :meth:`Text.domains`.
        max_tokens: of each.
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
