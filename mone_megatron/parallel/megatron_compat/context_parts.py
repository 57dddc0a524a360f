"""Cuts the part of a context-parallel rank out of angles and batches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _angles_of_context_rank(
    pos_emb: torch.Tensor, seq_dim: int, cp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Stands in for ``rope_utils.get_pos_emb_on_this_cp_rank``, which needs pinned memory."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    mine = cp_group.rank(), 2 * cp_group.size() - cp_group.rank() - 1
    return torch.cat([chunks[number] for number in mine], dim=seq_dim)


def cut_angles_on_cpu() -> None:
    """Lets the rotary embeddings cut a rank's angles without pinned memory."""
    from megatron.core.models.common.embeddings import (
        rope_utils,
        rotary_pos_embedding,
        yarn_rotary_pos_embedding,
    )

    for rope in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        rope.get_pos_emb_on_this_cp_rank = _angles_of_context_rank


def part_of_context_rank(
    batch: dict[str, Any], group: dist.ProcessGroup
) -> dict[str, torch.Tensor]:
    """Returns this rank's tokens of a batch: two chunks of each sequence, one from each end.

    0.19 also cuts batches in two other ways, has to be told which, and without a group takes all
    ranks.

    Args:
        batch: tensors ``[B, S, ...]`` by name.
        group: the context-parallel ranks.
    """
    from megatron.core.utils import get_batch_on_this_cp_rank

    part: Callable[..., dict[str, torch.Tensor]] = get_batch_on_this_cp_rank
    if "is_hybrid_cp" in inspect.signature(part).parameters:
        part = functools.partial(part, is_hybrid_cp=False)
    return part(batch, cp_group=group)
