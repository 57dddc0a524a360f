"""Defines the group ``data``: what the model reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast, NameIn, NotEmpty
from mone_megatron.config.wording import listed
from mone_megatron.methods.sources import SOURCES

# Tokens 0-255 of a byte-level BPE are the bytes; the rest is learnt, plus end-of-text.
_SMALLEST_BPE = 257
# megatron-core numbers the sources of a blend with 16 bits.
_MOST_SOURCES = 32766


@dataclass(frozen=True)
class DataConfig(Group):
    """Says what the model reads."""

    source: Annotated[str, NameIn(SOURCES)] = "stdlib"
    """Where corpora come from: `stdlib` builds one from the Python standard library in use;
    `indexed` reads Megatron .bin/.idx files made by tools/preprocess_data.py."""
    paths: tuple[str, ...] = ()
    """Path prefixes of the .bin/.idx pairs, without the extension (`indexed` only)."""
    weights: tuple[float, ...] = ()
    """The sampling weight of each path; empty for weights by size."""
    split: tuple[float, float, float] = (0.95, 0.05, 0.0)
    """Shares of documents for training, validation and test."""
    tokenizer: str = ""
    """The folder of a Hugging Face tokenizer (tokenizer.json); "" takes the one beside the data, or
    trains one on the stdlib corpus."""
    vocab_size: Annotated[
        int, AtLeast(_SMALLEST_BPE, "cannot hold the 256 bytes and end-of-text")
    ] = 4096
    """The vocabulary of the byte-level BPE that the stdlib corpus trains."""
    max_megabytes: Annotated[float, AtLeast(0)] = 0.0
    """The stdlib corpus takes files until this many MB of text; 0 for all."""
    cache_dir: Annotated[str, NotEmpty()] = ".cache/mone_megatron"
    """The folder of corpora and dataset indices that can be made again."""
    reset_attention: bool = False
    """Tokens see only their own document, up to its end-of-text; else all that is packed before
    them."""
    num_workers: Annotated[int, AtLeast(0)] = 0
    """Loader processes per rank; 0 loads in the training process."""

    def unread(self) -> Mapping[str, str]:
        """Returns what says how a corpus is made, where none or no tokenizer is."""
        if SOURCES[self.source].reads_paths:
            return dict.fromkeys(("vocab_size", "max_megabytes"), f"data.source={self.source}")
        if self.source == "stdlib" and self.tokenizer:
            return {"vocab_size": f"data.tokenizer={self.tokenizer}"}
        return {}

    def boundless(self) -> Collection[str]:
        """Returns the vocabulary where the source trains no tokenizer."""
        return ("vocab_size",) if SOURCES[self.source].reads_paths else ()

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this group alone."""
        yield from self._weights()
        yield from self._paths()
        yield from self._split()

    def _weights(self) -> Iterator[str]:
        if len(self.weights) not in (0, len(self.paths)):
            yield (
                f"data.weights: {len(self.weights)} weights for {len(self.paths)} data.paths; "
                "give one for each path, or none"
            )
        if any(weight <= 0 for weight in self.weights):
            yield (
                f"data.weights: {listed(self.weights)} has an entry that is not above 0; raise it, "
                "or leave its path out"
            )
        elif not math.isfinite(total := sum(self.weights)):
            yield (
                f"data.weights: {listed(self.weights)} are too large to add up; divide all of them"
            )
        elif self.weights and min(self.weights) / total == 0:
            yield (
                f"data.weights: {min(self.weights):g} of {total:g} is too small a share to be a "
                "number; raise it, or leave its path out"
            )

    def _paths(self) -> Iterator[str]:
        if len(self.paths) > _MOST_SOURCES:
            yield (
                f"data.paths: {len(self.paths)} paths are too many; use {_MOST_SOURCES} or fewer "
                "(tools/preprocess_data.py takes many files into one)"
            )
        if any(not path.strip() for path in self.paths):
            yield (
                "data.paths: has an empty path; give the path of a .bin/.idx pair without extension"
            )
        source = SOURCES[self.source]
        if source.reads_paths and not self.paths:
            yield (
                f"data.paths: empty with data.source={source.name}; make data with "
                "tools/preprocess_data.py and give its path without extension, or data=stdlib"
            )
        if self.paths and not source.reads_paths:
            yield (
                f"data.paths: not read with data.source={source.name}; use data=indexed, or "
                "data.paths=[]"
            )

    def _split(self) -> Iterator[str]:
        if any(share < 0 for share in self.split):
            yield f"data.split: {listed(self.split)} has a negative share; use 0 or more"
        elif sum(self.split) <= 0:
            yield f"data.split: {listed(self.split)} sums to 0; use such as [0.95, 0.05, 0.0]"
        elif self.split[0] <= 0:
            yield (
                f"data.split: {listed(self.split)} leaves nothing to train on; raise the first "
                "share"
            )
