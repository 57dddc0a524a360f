"""A store in a temporary folder, and what it logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from mone_megatron.checkpoint import CheckpointStore


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, logged: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", log=logged.append)
