"""Says what a run would begin with, from a checkpoint's manifest alone and without other ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mone_megatron.checkpoint import Checkpoint, CheckpointStore, open_checkpoint
from mone_megatron.config.schema import Config
from mone_megatron.os_errors import readable
from mone_megatron.train.resume.identity import check_same_model, check_same_run, require_run


def first_state(config: Config, identity: dict[str, Any], say: Callable[[str], None]) -> str:
    """Returns what a run would begin with, in words. The files of checkpoints are not read.

    Args:
        config: validated.
        identity: from :func:`~mone_megatron.train.resume.identity.run_identity`; what it lacks is
            taken for the same.
        say: is told what the run would tell of the checkpoint.

    Raises:
        ValueError: there is no checkpoint where one is named, or it is of another run or model.
    """
    resume, weights = config.checkpoint.resume, config.checkpoint.initialize
    found = None
    if resume == "auto":
        store = CheckpointStore(Path(config.run.dir) / "checkpoints", log=say)
        found = store.newest_verified(check=_unread)
    elif resume != "never":
        with readable(f"checkpoint.resume={resume}"):
            found = open_checkpoint(Path(resume), check=_unread)
    if found is not None:
        require_run(found.facts, found.path)
        saved = found.facts["identity"]
        chosen = resume != "auto"
        check_same_run(saved, saved | identity, found.path, chosen=chosen, say=say)
        return f"goes on from {found.path} after step {found.step}"
    if weights:
        with readable(f"checkpoint.initialize={weights}"):
            found = open_checkpoint(Path(weights), check=_unread)
        check_same_model(found.facts.get("identity", {}), identity, found.path)
        return f"begins with the weights of {found.path}"
    return "begins at step 0"


def _unread(checkpoint: Checkpoint) -> list[str]:
    """Returns that nothing is known to be wrong with a checkpoint."""
    return []
