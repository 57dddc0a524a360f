"""Checks what follows a bad loss against what there is to go back to."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config


def check(config: Config, _: Resources) -> Iterator[str]:
    """Yields a rollback without checkpoints."""
    if config.train.on_bad_loss == "rollback" and config.checkpoint.interval == 0:
        yield (
            "checkpoint.interval: 0 leaves train.on_bad_loss=rollback nothing to go back to; "
            "set checkpoint.interval, or train.on_bad_loss=skip"
        )
