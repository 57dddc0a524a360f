"""Defines the options that command lines which measure models share; imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_placement(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say how a model is loaded and where it computes."""
    group.add_argument("--batch-size", type=int, default=8, help="sequences at once (8)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (CUDA if there)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="auto: fp32 on a CPU, the model's own elsewhere",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a model folder brings"
    )


def labels_of(models: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Returns names to show: those given, or the last parts of the paths that tell them apart.

    Raises:
        ValueError: for another number of labels, or a label or model that is there twice.
    """
    if given is not None:
        if len(given) != len(models):
            raise ValueError(f"--labels: {len(given)} labels for {len(models)} models")
        if len(set(given)) != len(given):
            raise ValueError("--labels: give each model a label of its own")
        return list(given)
    parts = [Path(model).resolve().parts for model in models]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError("MODEL: one model is named twice; name it once")
