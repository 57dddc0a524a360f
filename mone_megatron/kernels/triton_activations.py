"""Computes activations of the gate projection in Triton, as device functions.

The kernels are given these functions as constants (``ACTIVATION``, ``SLOPE``); the entry of an
activation in :mod:`mone_megatron.methods.activations` names them.

**Bit for bit.** Scores are compared, so a kernel's activation has to be torch's to the last bit
(:mod:`.triton_select`). ReLU and its square take exactly rounded operations only; SiLU and sigmoid
take torch's order of operations with CUDA's own ``expf`` and a correctly rounded division, and
:func:`mone_megatron.kernels.fused.scores_equal_torch` compares them with torch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has no device library; there exp is numpy's.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# The bits of 80, where exp(80) and its inverse are well inside fp32.
_FAR = tl.constexpr(0x42A00000)


class FusedActivation(NamedTuple):
    """Holds the forms of one activation, each a device function of the gate projection in fp32."""

    # a.
    value: triton.JITFunction
    # a and da/dg.
    value_and_slope: triton.JITFunction
    # Whether a takes exactly rounded operations only, so that it is torch's in every bit.
    exact: bool


@triton.jit
def exponential(value: tl.tensor) -> tl.tensor:
    """Returns exp in fp32, as torch's CUDA kernels compute it; ``tl.exp`` is several ulps off."""
    if INTERPRETED:
        return tl.exp(value)
    else:  # noqa: RET505  Triton compiles the branch that is taken only if there is an else
        return libdevice.exp(value)


@triton.jit
def far_quotient(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    """Returns the correctly rounded quotient of any numbers."""
    return tl.div_rn(numerator, denominator)


@triton.jit
def near_quotient(numerator: tl.tensor, denominator: tl.tensor) -> tl.tensor:
    """Returns the quotient of numbers that are, as their quotient is, not near fp32's limits.

    Those are the steps of a correctly rounded division without its test for numbers that need
    others, which takes as long as all of them. The last bit of fp32 may differ, and none after
    rounding to bf16 (test_triton_compiles.py asks all gates, ``scores_equal_torch`` the device).
    """
    inverse = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [denominator],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    # 0 - x is an instruction, -1 x is none.
    minus = denominator * -1.0
    inverse = tl.fma(inverse, tl.fma(minus, inverse, 1.0), inverse)
    quotient = numerator * inverse
    return tl.fma(inverse, tl.fma(minus, quotient, numerator), quotient)


@triton.jit
def silu(gate: tl.tensor) -> tl.tensor:
    """Returns SiLU, g / (1 + exp(-g)), in torch's order of operations."""
    denominator = 1.0 + exponential(gate * -1.0)
    if INTERPRETED:
        return tl.div_rn(gate, denominator)
    else:  # noqa: RET505
        if tl.max(gate.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0) < _FAR:
            quotient = near_quotient(gate, denominator)
        else:
            quotient = far_quotient(gate, denominator)
        return quotient


@triton.jit
def silu_and_slope(gate: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns SiLU and its derivative."""
    share = tl.div_rn(1.0, 1.0 + exponential(gate * -1.0))
    return gate * share, share * (1.0 + gate * (1.0 - share))


@triton.jit
def sigmoid(gate: tl.tensor) -> tl.tensor:
    """Returns the sigmoid, 1 / (1 + exp(-g))."""
    return tl.div_rn(1.0, 1.0 + exponential(gate * -1.0))


@triton.jit
def sigmoid_and_slope(gate: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns the sigmoid and its derivative."""
    share = tl.div_rn(1.0, 1.0 + exponential(gate * -1.0))
    return share, share * (1.0 - share)


@triton.jit
def relu(gate: tl.tensor) -> tl.tensor:
    """Returns max(g, 0); NaN is not below 0, so it stays."""
    return tl.where(gate < 0, 0.0, gate)


@triton.jit
def relu_and_slope(gate: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns ReLU and its derivative, which is 0 at 0 as torch has it."""
    return tl.where(gate < 0, 0.0, gate), tl.where(gate <= 0, 0.0, 1.0)


@triton.jit
def relu2(gate: tl.tensor) -> tl.tensor:
    """Returns max(g, 0)^2."""
    positive = tl.where(gate < 0, 0.0, gate)
    return positive * positive


@triton.jit
def relu2_and_slope(gate: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns the square of ReLU and its derivative."""
    positive = tl.where(gate < 0, 0.0, gate)
    return positive * positive, 2.0 * positive


SILU = FusedActivation(silu, silu_and_slope, exact=False)
SIGMOID = FusedActivation(sigmoid, sigmoid_and_slope, exact=False)
RELU = FusedActivation(relu, relu_and_slope, exact=True)
RELU2 = FusedActivation(relu2, relu2_and_slope, exact=True)
