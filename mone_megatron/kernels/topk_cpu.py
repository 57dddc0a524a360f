"""Finds the few largest of many short rows on CPU, which torch sorts rows for.

Of 1,024 rows of 32 scores, as a router has them, ``torch.topk`` takes 312 us to find two; one
compiled pass (:mod:`.compiled_cpu`) takes a tenth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled, threads
from mone_megatron.kernels.few_largest import MOST_LARGEST


def topk(values: Tensor, k: int, dim: int = -1, **others: Any) -> tuple[Tensor, Tensor]:
    """Returns the ``k`` largest values of each row and their places, as ``torch.topk`` does.

    Where torch leaves the order of equal values open, the first comes first.

    Args:
        values: fp32 ``[R, n]`` on a CPU for the compiled pass; all else goes to torch.
        k: how many.
        dim: the last one for the compiled pass.
        others: further arguments of ``torch.topk``, which go to torch.
    """
    plain = values.dtype is torch.float32 and not values.is_cuda and values.dim() == 2
    library = compiled().library if plain and not others and dim in (-1, 1) else None
    if library is None or not 0 < k <= min(MOST_LARGEST, values.shape[1]):
        found = torch.topk(values, k, dim, **others)
        return found.values, found.indices
    rows = values.detach().contiguous()
    places = torch.empty(len(rows), k, dtype=torch.int64)
    library.largest_places(*rows.shape, k, address(rows), address(places), threads())
    return values.gather(1, places), places
