"""Knows in which forms the releases of megatron-core write checkpoints, and through what."""

from __future__ import annotations

import inspect
import queue
import re
from pathlib import Path

from mone_megatron.megatron_release import megatron_release

# The file in which older releases keep what is no tensor in a checkpoint.
COMMON = "common.pt"

_PREDICTION_LAYER = re.compile(r"^(mtp\.layers\.\d+\.)mtp_model_layer\.")


def patch_checkpoint_results() -> None:
    """Keeps the results of writing a checkpoint in this process, on any device.

    ``filesystem_async`` starts a server process, with torch imported in it, for each rank's first
    save, to take results from writers that it does not own. Ours report to the process itself.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


def own_writer() -> dict[str, str]:
    """Returns the arguments with which ``dist_checkpointing.save`` leaves the writing to us.

    From 0.17 on it saves through nvidia-resiliency-ext unless it is told to prepare what its own
    writer would write, which :mod:`mone_megatron.train.resume.writing` takes over.
    """
    # Where it is defined: what the package exports may have been wrapped, and takes anything then.
    from megatron.core.dist_checkpointing import serialization

    if "async_strategy" in inspect.signature(serialization.save).parameters:
        return {"async_strategy": "mcore"}
    return {}


def unreadable_form(checkpoint: Path) -> str | None:
    """Returns why the installed megatron-core cannot read a checkpoint; None where it can.

    0.19 keeps what is no tensor as one more object in the shards; older releases ask for a file
    ``common.pt``, which newer ones still read.
    """
    from megatron.core.dist_checkpointing import serialization

    if hasattr(serialization, "_legacy_common_state_exists") or (checkpoint / COMMON).exists():
        return None
    installed = ".".join(map(str, megatron_release()))
    return (
        f"a newer megatron-core than the installed {installed} wrote it (it has no {COMMON}); go "
        "on with the release that its manifest.json names (0.19 needs Python 3.12)"
    )


def stored_name(name: str) -> str:
    """Returns the name under which checkpoints hold a parameter, of its name in this release.

    0.19 calls the transformer layer of multi-token prediction otherwise than 0.16, and saves it by
    the older name.
    """
    return _PREDICTION_LAYER.sub(r"\1transformer_layer.", name)
