"""Defines the section ``model.product_key``: experts of one neuron that are found by keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast


@dataclass(frozen=True)
class ProductKeyConfig(Group):
    """Single-neuron experts retrieved by product keys (`model.experts=product_key`)."""

    keys: Annotated[int, AtLeast(1)] = 64
    """n: half keys of a side. A layer has n^2 experts of a neuron each."""
    key_dim: Annotated[int, AtLeast(1)] = 32
    """The size of a half key."""
    heads: Annotated[int, AtLeast(1)] = 4
    """The queries of a token; each takes experts of its own from the same n^2."""
    experts_per_head: Annotated[int, AtLeast(1)] = 16
    """k: the experts that a head takes."""

    def rules(self) -> Iterator[str]:
        """Yields what is wrong between the fields of this section alone."""
        if self.experts_per_head > self.keys**2 > 0:
            yield (
                f"model.product_key.experts_per_head: {self.experts_per_head} is more than the "
                f"{self.keys**2} experts of model.product_key.keys={self.keys}; use "
                f"{self.keys**2} or fewer"
            )
