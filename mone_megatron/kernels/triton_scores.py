"""Computes scores of neurons in Triton, as device functions of (gate, up, weight, NARROW).

The kernels are given one of these as a constant (``SCORE``), or None, which means that torch has
computed the scores; the entry of a score in :mod:`mone_megatron.methods.scores` names it. Values
are fp32; ``weight`` is the activation, and ``NARROW`` says that the inputs were bf16, where torch
rounds after each operation. The result is the score before its last rounding, and before its
absolute value if the score is not signed: :mod:`.triton_select` takes both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mone_megatron.kernels.triton_activations import INTERPRETED


@triton.jit
def narrow_bits(value: tl.tensor) -> tl.tensor:
    """Returns the fp32 bits of the nearest bf16, ties to even; of NaN, its own."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, bits, (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)


@triton.jit
def widened(value: tl.tensor) -> tl.tensor:
    """Returns numbers in fp32, exactly; the interpreter's own conversion loses subnormal bf16."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return value.to(tl.float32)


@triton.jit
def gate_score(
    gate: tl.tensor, up: tl.tensor, weight: tl.tensor, NARROW: tl.constexpr
) -> tl.tensor:
    """Returns g."""
    return gate


@triton.jit
def weight_score(
    gate: tl.tensor, up: tl.tensor, weight: tl.tensor, NARROW: tl.constexpr
) -> tl.tensor:
    """Returns a."""
    return weight


@triton.jit
def product_score(
    gate: tl.tensor, up: tl.tensor, weight: tl.tensor, NARROW: tl.constexpr
) -> tl.tensor:
    """Returns a * u; in bf16 the reference rounds the activation before the product."""
    if NARROW:
        weight = narrow_bits(weight).to(tl.float32, bitcast=True)
    return weight * up
