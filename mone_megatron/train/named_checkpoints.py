"""Looks whether the checkpoints that a configuration names are there, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mone_megatron.config.schema import Config
from mone_megatron.os_errors import readable


def check_named_checkpoints(config: Config) -> None:
    """Checks that the folders are there which a run would read. Nothing in them is looked at.

    Raises:
        ValueError: one is not there, or is no folder; one line naming the key.
    """
    for key, name, other in _named(config):
        path = Path(name)
        with readable(f"{key}={name}"):
            if path.is_dir():
                continue
            why = "is no folder" if os.path.lexists(path) else "is not there"
        raise ValueError(f"{key}: {path} {why}; name a checkpoint (step_00000100), {other}")


def _named(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yields each key that names a folder which is read, the name, and what else may be done."""
    resume, weights = config.checkpoint.resume, config.checkpoint.initialize
    if resume not in ("never", "auto"):
        yield "checkpoint.resume", resume, "or use auto or never"
    # A run that goes on from its own does not read what it began with, which may be gone.
    own = any((Path(config.run.dir) / "checkpoints").glob("step_*"))
    if weights and not (resume == "auto" and own):
        yield "checkpoint.initialize", weights, "or leave it out"
