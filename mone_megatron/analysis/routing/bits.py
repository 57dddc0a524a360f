"""Sets of neurons as bits: eight in a byte, the lowest neuron in the lowest bit.

Shape suffixes: R rows, F neurons of an expert, B bytes that hold their bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.uint8]


def packed_bytes(neurons: int) -> int:
    """B: bytes for ``neurons`` bits."""
    return -(-neurons // 8)


def pack(mask_RF: Tensor) -> Tensor:
    """``[..., F]`` bool to ``[..., B]`` uint8 on its device; the last byte is filled with zeros."""
    filled = torch.nn.functional.pad(mask_RF, (0, -mask_RF.shape[-1] % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask_RF.device)
    return (filled.unflatten(-1, (-1, 8)) * powers).sum(dim=-1, dtype=torch.uint8)


def unpack(bits_RB: Bits, neurons: int) -> Bits:
    """``[..., B]`` to ``[..., F]`` uint8 of zeros and ones."""
    return np.unpackbits(bits_RB, axis=-1, count=neurons, bitorder="little")


def count(bits_RB: Bits) -> npt.NDArray[np.int64]:
    """How many bits of each row are set: ``[..., B]`` to ``[...]`` int64."""
    return np.bitwise_count(bits_RB).sum(axis=-1, dtype=np.int64)
