"""Defines what is asked of a model, free of any library: it travels between processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRequest:
    """Asks how likely the last tokens are after those before."""

    # One more than the model reads: the last is only predicted.
    tokens: list[int]
    # How many of them are scored, from the end.
    scored: int
