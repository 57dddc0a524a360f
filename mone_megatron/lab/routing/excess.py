"""Finds by which token, or in which domain, each neuron is kept more than usually.

Shape suffixes: E experts, F neurons of an expert, G groups of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mone_megatron.lab.routing.counting import Counts, divide


@dataclass(frozen=True)
class Excess:
    """Holds, for each neuron, the group of tokens that keeps it most above its usual share.

    Attributes:
        group_EF: int32 number of the group; -1 where none occurs often enough.
        share_EF: float32 share of its occurrences in the expert that keep the neuron; NaN likewise.
        excess_EF: float32, how far that is above the share of all tokens; NaN likewise.
    """

    group_EF: npt.NDArray[np.int32]
    share_EF: npt.NDArray[np.float32]
    excess_EF: npt.NDArray[np.float32]


def largest_excess(
    kept_GEF: Counts, tokens_GE: Counts, kept_EF: Counts, tokens_E: Counts, min_count: int
) -> Excess:
    """Finds, for each neuron, the group whose tokens keep it most above the share of all tokens.

    Args:
        kept_GEF: tokens of each group, in each expert, that keep each neuron.
        tokens_GE: tokens of each group in each expert.
        kept_EF: all tokens in each expert that keep each neuron, in a group or not.
        tokens_E: all tokens in each expert.
        min_count: a group with fewer tokens in an expert is left out there.
    """
    experts, neurons = kept_EF.shape
    best = np.full((experts, neurons), -np.inf)
    group_EF = np.full((experts, neurons), -1, np.int64)
    share_EF = np.full((experts, neurons), np.nan)
    usual_EF = divide(kept_EF, tokens_E[:, None])
    # A loop over groups, so that only one is held as fractions.
    for group, (kept, tokens_1E) in enumerate(zip(kept_GEF, tokens_GE, strict=True)):
        shares = divide(kept, tokens_1E[:, None])
        excess = np.where(tokens_1E[:, None] >= max(1, min_count), shares - usual_EF, -np.inf)
        better = excess > best
        best = np.where(better, excess, best)
        group_EF[better] = group
        share_EF = np.where(better, shares, share_EF)
    excess_EF = np.where(group_EF >= 0, best, np.nan)
    return Excess(
        group_EF.astype(np.int32), share_EF.astype(np.float32), excess_EF.astype(np.float32)
    )
