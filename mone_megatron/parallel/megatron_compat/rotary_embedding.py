"""Rotates heads on CPU without megatron-core's copies of their halves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mone_megatron.kernels import rotary_cpu


def _with_lean_rotation(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns ``rope_utils._apply_rotary_pos_emb_bshd``, with ours where all heads are rotated."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(
        t: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        scale = kwargs.get("mscale", 1.0)
        other = args or any(value for name, value in kwargs.items() if name != "mscale")
        if other or scale != 1.0 or not rotary_cpu.supports(t, freqs):
            return original(t, freqs, *args, **kwargs)
        return rotary_cpu.rotate(t, freqs)

    return apply_rotary_pos_emb


def rotate_without_copies() -> None:
    """Puts our rotation in front of megatron-core's, on CPU."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = _with_lean_rotation(
        rope_utils._apply_rotary_pos_emb_bshd
    )
