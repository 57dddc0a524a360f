"""Defines the group ``run``: where a run lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mone_megatron.config.group import Group
from mone_megatron.config.marks import NotEmpty


@dataclass(frozen=True)
class RunConfig(Group):
    """Says where a run lives."""

    name: Annotated[str, NotEmpty()] = "run"
    """The name in logs, reports and W&B."""
    dir: Annotated[str, NotEmpty()] = "runs/run"
    """The folder that everything the run writes goes under."""
