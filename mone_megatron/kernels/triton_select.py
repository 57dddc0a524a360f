"""Finds the neurons a row keeps, exactly: Triton device functions, a kernel for given scores.

One program holds a whole row in registers. The order of non-negative floats is the order of their
bits read as integers, so the K-th largest score is found by bisection over those bits: 15 passes
for bf16 and 31 for fp32, each a comparison and a count, whatever the data. (Signed scores flip the
bits of negative numbers, and the first pass decides the sign.) No sort, no shared-memory histogram,
no atomics. Equal scores stay by a running count from the lowest index.

**Scores bit for bit.** The mask must be the reference's, whose scores are torch's in the dtype of
the gate. |g|, g, ReLU and ReLU^2 take exactly rounded operations only, the same on every device.
SiLU and sigmoid take an exponential, whose last bit is each library's own:

* bf16: fp32 arithmetic in torch's order of operations, with CUDA's own ``expf`` and a correctly
  rounded division, then one rounding to bf16 by integers (:func:`narrow_bits`). A bf16 gate has
  65,536 values, so :mod:`.fused` compares all of them with torch once, and says what follows when
  one differs.
* fp32: torch computes the scores, and the kernel selects among them.

Rows that hold a NaN keep nothing. Lanes beyond the row's end have a key below every score's.

Shape suffixes: N lanes of one program, a power of two of at least the row's neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mone_megatron.kernels.triton_scores import narrow_bits

# No score's key: below that of minus infinity.
_OUTSIDE = tl.constexpr(-(2**31))


@triton.jit
def neuron_score(
    gate: tl.tensor,
    up: tl.tensor,
    SCORE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NARROW: tl.constexpr,
) -> tl.tensor:
    """Returns the score in fp32, up to its sign and last rounding; ``NARROW`` for bf16 inputs."""
    return SCORE(gate, up, ACTIVATION(gate), NARROW)


@triton.jit
def order_keys(score: tl.tensor, SIGNED: tl.constexpr, NARROW: tl.constexpr) -> tl.tensor:
    """Returns int32 keys in the order of the scores: of their magnitudes, or with their signs.

    Of bf16 scores the lowest 16 bits are zero before the shift, so that 15 passes suffice.
    """
    bits = narrow_bits(score) >> 16 if NARROW else score.to(tl.int32, bitcast=True)
    MAGNITUDE: tl.constexpr = 0x7FFF if NARROW else 0x7FFFFFFF
    if SIGNED:
        # Zeros of both signs are equal; of other negative numbers a larger magnitude is less.
        return tl.where((bits & MAGNITUDE) == 0, 0, bits ^ ((bits >> 31) & MAGNITUDE))
    else:  # noqa: RET505
        return bits & MAGNITUDE


@triton.jit
def largest(
    score_N: tl.tensor,
    inside_N: tl.tensor,
    k: tl.tensor,
    SIGNED: tl.constexpr,
    NARROW: tl.constexpr,
) -> tl.tensor:
    """Returns True at a row's ``k`` largest scores, ties to lower indices; none if one is NaN."""
    BITS: tl.constexpr = 15 if NARROW else 31
    keys_N = tl.where(inside_N, order_keys(score_N, SIGNED, NARROW), _OUTSIDE)
    kth = tl.full([], 0, tl.int32)
    if SIGNED:
        kth = tl.where(tl.sum((keys_N >= 0).to(tl.int32), axis=0) >= k, 0, -(2**BITS))
    # The largest key that k or more keys reach, one bit after the other.
    for done in range(BITS):
        candidate = kth + (1 << (BITS - 1 - done))
        reached = tl.sum((keys_N >= candidate).to(tl.int32), axis=0)
        kth = tl.where(reached >= k, candidate, kth)
    above_N = keys_N > kth
    tied_N = (keys_N == kth).to(tl.int32)
    room = k - tl.sum(above_N.to(tl.int32), axis=0)
    kept_N = above_N | ((tied_N > 0) & (tl.cumsum(tied_N, axis=0) <= room))
    nans = tl.sum((inside_N & (score_N != score_N)).to(tl.int32), axis=0)
    return kept_N & (nans == 0)


@triton.jit(do_not_specialize=["k"])
def topk_mask_kernel(
    scores: tl.tensor,
    mask: tl.tensor,
    neurons: tl.tensor,
    k: tl.tensor,
    scores_stride: tl.tensor,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
) -> None:
    """Writes int8 1 at the ``k`` largest of ``scores[row]``, else 0. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane_N = tl.arange(0, BLOCK)
    inside_N = lane_N < neurons
    score_N = tl.load(scores + row * scores_stride + lane_N, mask=inside_N, other=0.0)
    kept_N = largest(score_N.to(tl.float32), inside_N, k, True, NARROW)
    tl.store(mask + row * neurons + lane_N, kept_N.to(tl.int8), mask=inside_N)


@triton.jit
def activation_kernel(
    gate: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
) -> None:
    """Writes the int16 bits of bf16 activations as scores have them, to compare with torch's."""
    lane_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight_N = ACTIVATION(tl.load(gate + lane_N).to(tl.float32))
    tl.store(out + lane_N, (narrow_bits(weight_N) >> 16).to(tl.int16))
