"""Makes the tokens of what lm-evaluation-harness asks where texts begin with a BOS.

The harness begins only the first window of a long text with it, twice, and what is too long loses
it. Models that cannot do without would get far too bad a score.
"""

from __future__ import annotations

from collections.abc import Sequence

from mone_megatron.data.framing import Framing

# Tokens that are read, and those after them that are scored.
Scored = tuple[list[int], list[int]]


def rolling_windows(ids: Sequence[int], opening: Sequence[int], max_length: int) -> list[Scored]:
    """Returns windows that score every token of a text once, each after the opening.

    Args:
        ids: of the text; its own opening, if it has one, is left out.
        opening: what each window begins with; at least one token.
        max_length: tokens that the model reads at most.
    """
    own, room = _without(ids, opening), max_length + 1 - len(opening)
    assert room > 0, "a window holds the opening and a token"
    return [(list(opening), list(own[start : start + room])) for start in range(0, len(own), room)]


def fitted(context: Sequence[int], wanted: Sequence[int], framing: Framing, length: int) -> Scored:
    """Returns a request that the model can read: what is too long loses its beginning.

    The opening of a text, if the context begins with it, stays.

    Args:
        context: tokens that are read.
        wanted: tokens that are scored after them.
        framing: of the model.
        length: tokens that the model reads at most; the last of ``wanted`` is not read.
    """
    whole = [*context, *wanted]
    opening = list(framing.opening)
    if len(whole) > length + 1:
        own = _without(context, opening)
        if len(own) == len(context):
            opening = []
        whole = [*opening, *whole[len(whole) - (length + 1 - len(opening)) :]]
    scored = min(len(wanted), len(whole) - max(1, len(opening)))
    return whole[:-scored], whole[len(whole) - scored :]


def _without(ids: Sequence[int], opening: Sequence[int]) -> Sequence[int]:
    begins = list(ids[: len(opening)]) == list(opening)
    return ids[len(opening) :] if begins else ids
