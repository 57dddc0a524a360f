"""Opens checkpoints: nothing in one is trusted, or unpickled, before it is verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_megatron.checkpoint.digests import MANIFEST_NAME, damaged_files
from mone_megatron.checkpoint.errors import DamagedCheckpointError
from mone_megatron.checkpoint.manifest import Manifest, read_manifest
from mone_megatron.checkpoint.names import parse_hidden, step_of


@dataclass(frozen=True)
class Checkpoint:
    """Describes a checkpoint whose manifest was read; only :meth:`verify` checks its files."""

    path: Path
    manifest: Manifest
    # SHA-256 of manifest.json, as hex: identifies the save.
    manifest_sha256: str

    @property
    def step(self) -> int:
        """Returns the number of optimizer steps done."""
        return self.manifest.step

    @property
    def facts(self) -> Mapping[str, Any]:
        """Returns what the run wrote about itself: plain JSON values by name."""
        return self.manifest.facts

    @property
    def size(self) -> int:
        """Returns the bytes of all files but the manifest."""
        return sum(file.size for file in self.manifest.files.values())

    def damage(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """Returns what is wrong with this rank's share of the files, one line each.

        The list is empty when nothing is wrong.

        All files are read. With ``world_size`` above 1 each rank reads its share, and the
        checkpoint is sound only if every rank returns an empty list.
        """
        return damaged_files(self.path, self.manifest.files, rank=rank, world_size=world_size)

    def verify(self) -> None:
        """Reads and checks every file.

        Raises:
            DamagedCheckpointError: naming each damaged file and what is wrong with it.
        """
        if problems := self.damage():
            raise DamagedCheckpointError(self.path, problems)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's manifest and checks it; the files are not checked yet.

    Raises:
        DamagedCheckpointError: no manifest, a damaged one, or one of another step than the
            folder's name says.
    """
    manifest, digest = read_manifest(folder)
    hidden = parse_hidden(folder.name)
    # A copy under another kind of name ("best") is fine.
    named = hidden.step if hidden else step_of(folder.name)
    if named is not None and named != manifest.step:
        problem = f"{MANIFEST_NAME}: it is of step {manifest.step}, the folder {folder.name}"
        raise DamagedCheckpointError(folder, [problem])
    return Checkpoint(path=folder, manifest=manifest, manifest_sha256=digest)


def open_checkpoint(
    folder: Path, *, check: Callable[[Checkpoint], list[str]] = Checkpoint.damage
) -> Checkpoint:
    """Opens a checkpoint and verifies it: every file was read and is what was saved.

    Args:
        folder: one checkpoint, under any name.
        check: returns what is wrong with a checkpoint, as :meth:`Checkpoint.damage` does; one that
            hands each rank its share verifies with all ranks.

    Raises:
        DamagedCheckpointError: naming each damaged file and what is wrong with it.
        ValueError: the folder holds checkpoints instead of being one.
    """
    if not (folder / MANIFEST_NAME).exists() and folder.is_dir():
        steps = [path for base in (folder, folder / "checkpoints") for path in base.glob("step_*")]
        if steps:
            raise ValueError(f"{folder} is not a checkpoint but holds some; give {max(steps)}")
    checkpoint = read_checkpoint(folder)
    if problems := check(checkpoint):
        raise DamagedCheckpointError(folder, problems)
    return checkpoint
