"""Makes a drawing smaller while a fault stays.

Hypothesis shrinks, too, and was weighed: it shrinks the choices that a drawing was made from, each
try of which here would be a run of seconds, and it has no notion of a time to end at, nor of going
on after a fault. Overrides can be left out by themselves, so leaving them out is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mone_megatron.testing.fuzz.drawing import Drawing

Fails = Callable[[Drawing], bool]


def shrunk(drawing: Drawing, fails: Fails) -> Drawing:
    """Returns a smaller drawing that still fails: no override of it can be left out.

    Args:
        drawing: one that fails.
        fails: whether a drawing has the fault; of one that the checks refuse it says no.
    """
    simpler: tuple[dict[str, Any], ...] = (
        {"layout": {}, "ranks": 1},
        {"data": "words"},
        {"experiment": "tiny_moe"},
    )
    for change in simpler:
        if (changed := replace(drawing, **change)) != drawing and fails(changed):
            drawing = changed
    # Halves first, then parts of them: most overrides have nothing to do with it.
    size = max(len(drawing.overrides) // 2, 1)
    while True:
        keys = list(drawing.overrides)
        left_out = False
        for start in range(0, len(keys), size):
            gone = set(keys[start : start + size])
            fewer = {k: v for k, v in drawing.overrides.items() if k not in gone}
            if len(fewer) < len(drawing.overrides) and fails(replace(drawing, overrides=fewer)):
                drawing = replace(drawing, overrides=fewer)
                left_out = True
        if size == 1 and not left_out:
            break
        size = max(size // 2, 1)
    for key in list(drawing.layout):
        fewer = {k: v for k, v in drawing.layout.items() if k != key}
        if fails(smaller := replace(drawing, layout=fewer)):
            drawing = smaller
    return drawing
