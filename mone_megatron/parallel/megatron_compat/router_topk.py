"""Lets megatron-core's routers find the experts of a token by our ``topk`` on CPU."""

from __future__ import annotations

from typing import Any

import torch

from mone_megatron.kernels.topk_cpu import topk


class _Torch:
    """Stands where the library's functions of routers expect ``torch``."""

    topk = staticmethod(topk)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def choose_experts_in_one_pass() -> None:
    """Puts our ``topk`` in front of torch's, which takes 1% of a step of 32 experts."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.torch = _Torch()
