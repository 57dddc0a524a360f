"""Compares what two runs recorded and saved: bit for bit, or as two layouts may differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mone_megatron.testing.commit_comparison.values import (
    Values,
    checkpoint_values,
    flatten,
    newest_checkpoint,
)
from mone_megatron.testing.flips import first_flip

Record = dict[str, float]
# Of losses and gradient norms over layouts, up to a token that chooses otherwise by rounding
# (docs/parallelism.md), and from there on. The recorded test of layouts is as strict over 20 steps.
TOLERANCE = 1e-5
LOSS_AFTER_FLIP = 1e-3
GRAD_NORM_AFTER_FLIP = 1e-1

# What compares a step with the one that was logged before, and what is logged with it.
_OF_TWO, _OF_LAYERS = "/load_overlap", "/load_entropy"


def read_records(run: Path) -> list[Record]:
    """Returns what a run recorded: one object a step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def different(whole: Path, other: Path) -> str:
    """Returns where the records of a run differ in a bit from those of the same steps; or ""."""
    recorded = {record["step"]: record for record in read_records(whole)}
    records = read_records(other)
    if not records:
        return "nothing was recorded"
    # A number of two steps of which the other run had only one (docs/metrics.md).
    first = records[0]["step"] > min(recorded)
    for record in records:
        step = int(record["step"])
        there = recorded.get(step)
        if there is None:
            return f"step {step} is not in both"
        if first:
            there = {key: value for key, value in there.items() if _OF_TWO not in key}
            first = not any(_OF_LAYERS in key for key in record)
        if where := _first(flatten(f"step {step}", there), flatten(f"step {step}", record)):
            return where
    return ""


def different_states(one: Path, other: Path) -> str:
    """Returns what two runs' last checkpoints do not both hold with the same bits; or ""."""
    folders = [newest_checkpoint(one), newest_checkpoint(other)]
    if None in folders:
        return "" if folders[0] == folders[1] else "one of them has no checkpoint"
    states = []
    for folder in folders:
        assert folder is not None
        values = checkpoint_values(folder)
        states.append({k: v for k, v in values.items() if k.startswith("state ")})
    return _first(states[0], states[1])


def _first(one: Values, other: Values) -> str:
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name, "nothing") != other.get(name, "nothing"):
            return f"{name} is {other.get(name, 'nothing')}, not {one.get(name, 'nothing')}"
    return ""


def disagreement(reference: Sequence[Record], records: Sequence[Record]) -> str:
    """Returns where a layout differs from one rank by more than rounding; or ""."""
    steps = [record["step"] for record in reference], [record["step"] for record in records]
    if steps[0] != steps[1]:
        return f"steps {steps[1]}, not {steps[0]}"
    try:
        flip = first_flip(reference, records)
    except KeyError as missing:
        return f"{missing.args[0]} is not recorded"
    for expected, actual in zip(reference, records, strict=True):
        before = expected["step"] < flip
        bounds: Mapping[str, float] = {
            "loss": TOLERANCE if before else LOSS_AFTER_FLIP,
            "grad_norm": TOLERANCE * 3 if before else GRAD_NORM_AFTER_FLIP,
        }
        for key, bound in bounds.items():
            if not math.isclose(actual[key], expected[key], rel_tol=bound, abs_tol=1e-9):
                return (
                    f"step {expected['step']:.0f}: {key} is {actual[key]!r}, not {expected[key]!r}"
                    f"{'' if before else ', after a flip'}"
                )
    return ""
