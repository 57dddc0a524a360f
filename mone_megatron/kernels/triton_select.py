"""Finds the neurons a row keeps, exactly: Triton device functions, a kernel for given scores.

One program holds a whole row in registers. The order of non-negative floats is the order of their
bits read as integers, so the K-th largest score is found by bisection over those keys, each pass a
comparison and a count. (Scores with signs are first moved, so that the keys that matter are not
negative.) The K-th largest is usually within 8 powers of two of the largest: 10 passes for bf16 and
26 for fp32 find it there, fewer when a key is found that exactly K keys reach; else 15 and 31 find
it anywhere. No sort, no shared-memory histogram, no atomics. Equal scores stay by a running count
from the lowest index.

**Pairs.** Keys of bf16 scores have 15 bits, so two of them are compared and counted in one int32,
which halves the work; flags of kept neurons come in pairs, too (bit 0 and bit 16).

**Scores bit for bit.** The mask must be the reference's, whose scores are torch's in the dtype of
the gate. |g|, g, ReLU and ReLU^2 take exactly rounded operations only, the same on every device.
SiLU and sigmoid take an exponential, whose last bit is each library's own:

* bf16: fp32 arithmetic in torch's order of operations, with CUDA's own ``expf`` and a correctly
  rounded division, then one rounding to bf16 by integers (:func:`narrow_bits`). A bf16 gate has
  65,536 values, so :mod:`.fused` compares all of them with torch once, and says what follows when
  one differs.
* fp32: torch computes the scores, and the kernel selects among them.

Rows that hold a NaN keep nothing. Lanes beyond the row's end have the lowest key and the highest
indices, so that they never stay: K is at most the row's neurons.

Shape suffixes: N lanes of one program, a power of two of at least the row's neurons; P pairs of
lanes, an even one and the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mone_megatron.kernels.triton_activations import INTERPRETED
from mone_megatron.kernels.triton_scores import narrow_bits, widened


@triton.jit
def paired(even_and_odd_N: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns the lanes with even and those with odd numbers, which lie in one thread."""
    LANES: tl.constexpr = even_and_odd_N.shape[0]
    return tl.split(tl.reshape(even_and_odd_N, [LANES // 2, 2]))


@triton.jit
def pairs_from(flag_N: tl.tensor) -> tl.tensor:
    """Returns int32 pairs with bit 0 set for an even lane's flag and bit 16 for an odd one's."""
    even_P, odd_P = paired(flag_N.to(tl.int32))
    return even_P | (odd_P << 16)


@triton.jit
def lanes_of(pair_P: tl.tensor) -> tl.tensor:
    """Returns the int32 halves of pairs, lane by lane."""
    LANES: tl.constexpr = pair_P.shape[0] * 2
    return tl.reshape(tl.join(pair_P & 0xFFFF, pair_P >> 16), [LANES])


@triton.jit
def ones_of(flag_P: tl.tensor) -> tl.tensor:
    """Returns fp32 1 where the flag of a lane is set, else 0."""
    LANES: tl.constexpr = flag_P.shape[0] * 2
    # Two bf16 ones.
    both_P = flag_P * 0x3F80
    even_P = (both_P << 16).to(tl.float32, bitcast=True)
    odd_P = (both_P & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even_P, odd_P), [LANES])


@triton.jit
def narrow_key(bits: tl.tensor) -> tl.tensor:
    """Returns the bf16 bits of a magnitude given as fp32 bits; NaN stays above infinity."""
    return tl.where(bits > 0x7F800000, 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@triton.jit
def bf16_pairs(score_N: tl.tensor) -> tl.tensor:
    """Returns the bits of scores rounded to bf16, two in an int32."""
    even_P, odd_P = paired(score_N)
    if INTERPRETED:
        return ((narrow_bits(even_P) >> 16) & 0xFFFF) | (narrow_bits(odd_P) & -65536)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [even_P, odd_P],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def reached_by(keys: tl.tensor, least: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """Returns flags of keys of at least ``least``: int32 pairs of narrow keys, else int32."""
    if NARROW:
        return ((keys - least * 0x10001) >> 15) & 0x10001
    else:  # noqa: RET505
        return (keys >= least).to(tl.int32)


@triton.jit
def count_from(keys: tl.tensor, least: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """Returns how many keys reach ``least``."""
    count = tl.sum(reached_by(keys, least, NARROW), axis=0)
    return (count & 0xFFFF) + (count >> 16) if NARROW else count


@triton.jit
def without_last(kept_P: tl.tensor, tied_P: tl.tensor, excess: tl.tensor) -> tl.tensor:
    """Returns ``kept_P`` without the last ``excess`` of the tied lanes."""
    both_P = (tied_P & 0xFFFF) + (tied_P >> 16)
    upto_P = tl.cumsum(both_P, axis=0)
    room = tl.sum(both_P, axis=0) - excess
    odd_P = tl.where(upto_P > room, 0x10000, 0)
    even_P = tl.where(upto_P - (tied_P >> 16) > room, 1, 0)
    return kept_P & ~(tied_P & (odd_P | even_P))


@triton.jit
def flags_from(keys: tl.tensor, least: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """Returns flags, in pairs, of keys of at least ``least``."""
    reached = reached_by(keys, least, NARROW)
    return reached if NARROW else pairs_from(reached)


@triton.jit
def search(
    keys: tl.tensor, top: tl.tensor, k: tl.tensor, LANES: tl.constexpr, NARROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns a key that ``k`` or more keys reach, and how many do.

    If they are more, it is the largest such key.
    """
    BITS: tl.constexpr = 15 if NARROW else 31
    # Those of 8 powers of two.
    SPAN: tl.constexpr = BITS - 5
    kth = tl.maximum(top - ((1 << SPAN) - 1), 0)
    reached = count_from(keys, kth, NARROW)
    near = reached >= k
    step = tl.where(near, 1 << (SPAN - 1), 1 << (BITS - 1))
    kth = tl.where(near, kth, 0)
    reached = tl.where(near, reached, LANES)
    while (step > 0) & (reached != k):
        counted = count_from(keys, kth + step, NARROW)
        kth = tl.where(counted >= k, kth + step, kth)
        reached = tl.where(counted >= k, counted, reached)
        step = step >> 1
    return kth, reached


@triton.jit
def keys_of_magnitudes(
    score_N: tl.tensor, inside_N: tl.tensor, NARROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns int32 keys (narrow ones in pairs), the largest, and whether a score is NaN."""
    bits_N = tl.where(inside_N, score_N.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    top = tl.max(bits_N, axis=0)
    nan = top > 0x7F800000
    if NARROW:
        # Rounding keeps the order.
        return bf16_pairs(bits_N.to(tl.float32, bitcast=True)), narrow_key(top), nan
    else:  # noqa: RET505
        return bits_N, top, nan


@triton.jit
def keys_with_signs(
    score_N: tl.tensor, inside_N: tl.tensor, k: tl.tensor, NARROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns int32 keys (narrow ones in pairs), the largest, and whether a score is NaN.

    When ``k`` scores are not negative, all negative ones have the key 0, else all others have the
    same key above theirs.
    """
    MAGNITUDE: tl.constexpr = 0x7FFF if NARROW else 0x7FFFFFFF
    INFINITY: tl.constexpr = 0x7F80 if NARROW else 0x7F800000
    bits_N = narrow_bits(score_N) >> 16 if NARROW else score_N.to(tl.int32, bitcast=True)
    # Zeros of both signs are equal; of other negative numbers a larger magnitude is less.
    order_N = tl.where((bits_N & MAGNITUDE) == 0, 0, bits_N ^ ((bits_N >> 31) & MAGNITUDE))
    order_N = tl.where(score_N != score_N, MAGNITUDE, order_N)
    order_N = tl.where(inside_N, order_N, -MAGNITUDE - 1)
    top = tl.max(order_N, axis=0)
    enough = tl.sum((order_N >= 0).to(tl.int32), axis=0) >= k
    most = tl.where(enough, INFINITY, -1)
    shift = tl.where(enough, 1, INFINITY + 2)
    key_N = tl.maximum(tl.minimum(order_N, most) + shift, 0)
    nan = top > INFINITY
    top = tl.minimum(top, most) + shift
    if NARROW:
        even_P, odd_P = paired(key_N)
        return even_P | (odd_P << 16), top, nan
    else:  # noqa: RET505
        return key_N, top, nan


@triton.jit
def largest(
    score_N: tl.tensor,
    inside_N: tl.tensor,
    k: tl.tensor,
    SIGNED: tl.constexpr,
    NARROW: tl.constexpr,
) -> tl.tensor:
    """Returns flags, in pairs, of a row's ``k`` largest scores; none if one is NaN.

    Ties go to lower indices.
    """
    if SIGNED:
        keys, top, nan = keys_with_signs(score_N, inside_N, k, NARROW)
    else:
        keys, top, nan = keys_of_magnitudes(score_N, inside_N, NARROW)
    if NARROW:
        # Whether the difference of a key and another shows in the highest bit of its half.
        keys = keys | -0x7FFF8000
    kth, reached = search(keys, top, k, score_N.shape[0], NARROW)
    kept_P = flags_from(keys, kth, NARROW)
    if reached > k:
        kept_P = without_last(kept_P, kept_P ^ flags_from(keys, kth + 1, NARROW), reached - k)
    return kept_P * (nan == 0).to(tl.int32)


@triton.jit(do_not_specialize=["k"])
def topk_mask_kernel(
    scores: tl.tensor,
    mask: tl.tensor,
    k: tl.tensor,
    scores_stride: tl.tensor,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
) -> None:
    """Writes int8 1 at the ``k`` largest of ``scores[row]``, else 0. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane_N = tl.arange(0, BLOCK)
    inside_N = lane_N < NEURONS
    score_N = tl.load(scores + row * scores_stride + lane_N, mask=inside_N, other=0.0)
    kept_P = largest(widened(score_N), inside_N, k, True, NARROW)
    tl.store(mask + row * NEURONS + lane_N, lanes_of(kept_P).to(tl.int8), mask=inside_N)


@triton.jit
def activation_kernel(
    gate: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
) -> None:
    """Writes the int16 bits of bf16 activations as scores have them, to compare with torch's."""
    lane_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight_N = ACTIVATION(tl.load(gate + lane_N).to(tl.float32))
    tl.store(out + lane_N, (narrow_bits(weight_N) >> 16).to(tl.int16))
