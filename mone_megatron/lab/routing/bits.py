"""Stores sets of neurons as bits: eight in a byte, the lowest neuron in the lowest bit.

This is how :func:`mone_megatron.kernels.packed.pack_bits` packs them.

Shape suffixes: R rows, F neurons of an expert, B bytes that hold their bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint8]


def packed_bytes(neurons: int) -> int:
    """Returns B, how many bytes hold the bits of ``neurons`` neurons."""
    return -(-neurons // 8)


def unpack(bits_RB: Bits, neurons: int) -> Bits:
    """Returns the bits ``[..., B]`` unpacked to ``[..., F]`` uint8 of zeros and ones."""
    return np.unpackbits(bits_RB, axis=-1, count=neurons, bitorder="little")


def count(bits_RB: Bits) -> npt.NDArray[np.int64]:
    """Returns how many bits of each row are set: ``[..., B]`` becomes ``[...]`` int64."""
    return np.bitwise_count(bits_RB).sum(axis=-1, dtype=np.int64)
