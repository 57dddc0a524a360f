"""Says which part of its experts a token computes, from what was counted at every place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mone_megatron.lab.sparsification.engine import Tallies
from mone_megatron.lab.sparsification.plans import activated


@dataclass(frozen=True)
class Use:
    """Holds what a token computes, as shares of what it computes with nothing pruned.

    Attributes:
        pruned: share of its experts' neurons that it does not use.
        activated: share of its experts' parameters that it needs.
    """

    pruned: float
    activated: float

    @classmethod
    def of(cls, tallies: Sequence[Sequence[Sequence[int]]], before: int) -> Use:
        """Returns what was counted, as :func:`tallies_json` gives it.

        Args:
            tallies: of each place of each layer.
            before: projections that the choice reads of every neuron.
        """
        total = computed = kept = 0
        for layer in tallies:
            for place_rows, place_computed, place_kept, neurons in layer:
                total += place_rows * neurons
                computed += place_computed * neurons
                kept += place_kept
        return cls(1 - kept / total, activated(before, computed / total, kept / total))


def tallies_json(tallies: Tallies) -> list[list[list[int]]]:
    """Returns counts for a results file."""
    return [[[one.rows, one.computed, one.kept, one.neurons] for one in layer] for layer in tallies]
