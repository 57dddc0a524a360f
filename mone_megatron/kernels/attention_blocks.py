"""Says how attention on CPU is cut into blocks, for what computes it and for what plans its memory.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator

# Queries whose products are computed at once. Fewer skip more of what the causal mask hides, more
# make larger products; 32 takes 6% longer and 128 takes 10% longer (4 x 256 tokens, 6 heads of 32).
QUERIES = 64
# Lengths of sequences whose weights are kept for the backward pass. In shorter ones the calls take
# what they save; memory grows with the square of the length.
FEWEST_TOKENS, MOST_TOKENS = 192, 512


def keeps_weights(length: int) -> bool:
    """Returns whether attention of sequences of so many tokens keeps its weights."""
    return FEWEST_TOKENS <= length <= MOST_TOKENS


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yields the first query of each block of a sequence, and where the block ends.

    The queries of a block are weighed against all keys before its end.
    """
    for first in range(0, length, QUERIES):
        yield first, min(first + QUERIES, length)


def weights_of_head(length: int) -> int:
    """Returns how many weights a head keeps of one sequence."""
    return sum((end - first) * end for first, end in blocks(length))
