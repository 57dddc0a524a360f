"""Small saves for the tests of the store."""

from __future__ import annotations

import random
from pathlib import Path

from mone_megatron.checkpoint import Checkpoint, CheckpointStore


def contents(step: int, attempt: int = 0) -> dict[str, bytes]:
    """Files as a distributed save leaves them, told apart by step and attempt."""
    noise = random.Random(1000 * step + attempt)
    return {
        ".metadata": noise.randbytes(300),
        "__0_0.distcp": noise.randbytes(2000),
        "__1_0.distcp": noise.randbytes(2000),
        "common.pt": noise.randbytes(100),
        "tokenizer/tokenizer.json": noise.randbytes(50),
        "empty": b"",
    }


def write(partial: Path, files: dict[str, bytes]) -> None:
    """What the ranks do."""
    for name, content in files.items():
        path = partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def save(store: CheckpointStore, step: int, attempt: int = 0) -> Path:
    """One whole save."""
    partial = store.begin(step)
    write(partial, contents(step, attempt))
    return store.commit(partial, {"step": step, "attempt": attempt})


def read(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of a checkpoint that its manifest names."""
    return {name: (checkpoint.path / name).read_bytes() for name in checkpoint.manifest.files}


def holds(checkpoint: Checkpoint, step: int, attempt: int = 0) -> bool:
    """Whether it is exactly that save."""
    return (
        checkpoint.step == step
        and checkpoint.facts == {"step": step, "attempt": attempt}
        and read(checkpoint) == contents(step, attempt)
    )
