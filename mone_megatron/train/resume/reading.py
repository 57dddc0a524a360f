"""Finding, verifying and loading a checkpoint with all ranks together.

Every function is collective over all ranks: each verifies its share of the files, and what is
wrong is raised on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from mone_megatron.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    open_checkpoint,
    read_checkpoint,
    restricted_pickle,
)
from mone_megatron.parallel.megatron_compat.checkpoint_forms import unreadable_form

# What a checkpoint says is wrong with it, empty when nothing.
Check = Callable[[Checkpoint], list[str]]
# Entries of a checkpoint by the name under which they are stored; None for what is no tensor.
Shapes = dict[str, tuple[int, ...] | None]


def broadcast(value: Any = None) -> Any:
    """Returns rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def union(mine: Iterable[str]) -> list[str]:
    """Returns what any rank has, sorted, on every rank."""
    everyones: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, list(mine))
    return sorted({one for theirs in everyones for one in theirs})


def find(look: Callable[[Check], Checkpoint | None]) -> tuple[Path, dict[str, Any]] | None:
    """Returns a checkpoint of which every rank has verified its share of the files.

    Rank 0 looks; for each checkpoint it wants verified it sends the others the path, and at the
    end what was found.

    Args:
        look: runs on rank 0, with what verifies a checkpoint.

    Returns:
        Folder and facts, or None when ``look`` found none.

    Raises:
        OSError, ValueError: what ``look`` raised, on every rank.
    """
    if dist.get_rank() == 0:
        error: Exception | None = None
        found: Checkpoint | None = None
        try:
            found = look(_check_from_rank_0)
        except (OSError, ValueError) as problem:
            error = problem
        answer = (error, None if found is None else (found.path, dict(found.facts)))
        broadcast(answer)
    else:
        while isinstance(answer := broadcast(), Path):
            _verify_share(answer)
    if answer[0] is not None:
        raise answer[0]
    return answer[1]


def find_at(path: Path) -> tuple[Path, dict[str, Any]]:
    """Does what :func:`find` does, for one that the user named.

    Raises:
        DamagedCheckpointError: naming each damaged file.
        ValueError: it is none, but a folder that holds some.
    """
    found = find(lambda check: open_checkpoint(path, check=check))
    assert found is not None
    return found


def _check_from_rank_0(checkpoint: Checkpoint) -> list[str]:
    broadcast(checkpoint.path)
    return _verify_share(checkpoint.path)


def _verify_share(folder: Path) -> list[str]:
    """Verifies a checkpoint together, and returns what is wrong with it, on every rank."""
    try:
        mine = read_checkpoint(folder).damage(dist.get_rank(), dist.get_world_size())
    except DamagedCheckpointError as error:
        mine = list(error.problems)
    return union(mine)


def stored_shapes(folder: Path) -> Shapes:
    """Returns what a verified checkpoint holds. Call it within ``restricted_pickle``."""
    return {
        key: tuple(entry.global_shape) if isinstance(entry, ShardedTensor) else None
        for key, entry in load_sharded_metadata(str(folder)).items()
    }


def wanted_shapes(content: ShardedStateDict) -> Shapes:
    """Returns what a checkpoint must hold to fill ``content``."""
    shapes: Shapes = {}
    for entry in nested_values(content):
        if isinstance(entry, ShardedTensorFactory):
            shapes |= wanted_shapes({"built": entry.build()})
        elif isinstance(entry, ShardedTensor):
            shapes[entry.key] = tuple(entry.global_shape)
        else:
            assert isinstance(entry, ShardedObject), type(entry)
            shapes[entry.unique_key] = None
    return shapes


def load(folder: Path, content: ShardedStateDict, *, needed_for: str) -> dict[str, Any]:
    """Fills ``content`` from a verified checkpoint.

    Args:
        folder: from :func:`find`.
        content: sharded tensors and objects, of this rank's parts.
        needed_for: ends the message about what is missing.

    Returns:
        The content, and what the checkpoint holds beside its tensors.

    Raises:
        UnsafePickleError: the checkpoint wants to run something.
        ValueError: it lacks anything of ``content`` (on any rank), holds it in another shape, or is
            in a form that the installed megatron-core does not know.
    """
    if problem := unreadable_form(folder):
        raise ValueError(f"checkpoint {folder}: {problem}")
    with restricted_pickle(folder):
        there, wanted = stored_shapes(folder), wanted_shapes(content)
        # Ranks ask for different entries, and all must refuse, before anything is loaded.
        if missing := union(wanted.keys() - there.keys()):
            raise incomplete(folder, missing, needed_for)
        other = [
            f"{key} is {list(there[key] or ())}, not {list(shape)}"
            for key, shape in wanted.items()
            if shape is not None and there[key] != shape
        ]
        # megatron-core fills a vocabulary of another size with nothing.
        if other := union(other):
            raise ValueError(
                f"checkpoint {folder}: {'; '.join(other[:5])}{_more(other)}; use another checkpoint"
            )
        # Its access check is for saves: here the main replica of a tensor may not want it.
        loaded: dict[str, Any] = dist_checkpointing.load(
            content, str(folder), validate_access_integrity=False
        )
    return loaded


@torch.no_grad()
def fill_chunk(chunk: DistributedDataParallel, weights: dict[str, Tensor]) -> None:
    """Copies weights and buffers into a chunk, in its dtype. Not collective."""
    result = unwrap_model(chunk).load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not missing, missing
    assert not result.unexpected_keys, result.unexpected_keys


def incomplete(folder: Path, missing: list[str], needed_for: str) -> ValueError:
    """Returns the error of a checkpoint that lacks something. Not collective."""
    return ValueError(
        f"checkpoint {folder} holds no {', '.join(missing[:5])}{_more(missing)}; {needed_for}"
    )


def _more(items: list[str]) -> str:
    return f" and {len(items) - 5} more" if len(items) > 5 else ""
