"""Defines what a data source is: where the corpora of a run come from.

It imports no torch, so that names can be checked without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mone_megatron.methods.registry import imported


@dataclass(frozen=True)
class Source:
    """Describes one data source; ``data.source`` names it.

    Attributes:
        name: the data source's name in the configuration.
        formula: what it reads, for tables.
        source: the paper or place that it comes from.
        build: ``module:function`` of a function that takes the ``data`` section of the
            configuration and returns the prefix of a corpus as ``tools/preprocess_data.py`` writes
            it, which it builds in ``data.cache_dir`` when it is not there. Every process calls it,
            so it locks what it writes. None reads the corpora that ``data.paths`` names.
    """

    name: str
    formula: str
    source: str
    build: str | None

    @property
    def reads_paths(self) -> bool:
        """Returns whether ``data.paths`` names its corpora."""
        return self.build is None

    def prefix(self, data: Any) -> Path:
        """Returns the prefix of the corpus that it builds of the ``data`` section."""
        assert self.build is not None, f"{self.name} builds nothing"
        return cast("Callable[[Any], Path]", imported(self.build))(data)
