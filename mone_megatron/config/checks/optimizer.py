"""Checks the optimizer against the ways in which weights are split over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.methods.optimizers import OPTIMIZERS


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields what splits the matrices of an optimizer that needs them whole."""
    name, parallel = config.optim.name, config.parallel
    if name not in OPTIMIZERS or not OPTIMIZERS[name].whole:
        return
    if parallel.distributed_optimizer:
        yield (
            f"optim.name: {name} needs whole matrices, and parallel.distributed_optimizer=true "
            "cuts them over data-parallel ranks; use parallel.distributed_optimizer=false"
        )
    for key, size in (("tensor", parallel.tensor), ("expert_tensor", parallel.expert_tensor)):
        if size > 1:
            yield (
                f"optim.name: {name} needs whole matrices, and parallel.{key}={size} cuts them; "
                f"use parallel.{key}=1 (experts may be spread: parallel.expert)"
            )
