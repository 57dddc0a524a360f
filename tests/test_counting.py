"""Numbers of things, as people say them."""

from __future__ import annotations

import pytest

from mone_megatron.counting import counted


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (4, "microbatch", "4 microbatches"),
        (1, "CUDA device", "1 CUDA device"),
        (1024, "token", "1,024 tokens"),
    ],
)
def test_one_is_singular(number: int, noun: str, said: str) -> None:
    assert counted(number, noun) == said
