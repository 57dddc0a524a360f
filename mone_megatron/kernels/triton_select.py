"""Finds the neurons a row keeps, exactly: Triton device functions, a kernel for given scores.

One program holds a whole row in registers. The order of non-negative floats is the order of their
bits read as integers, so the K-th largest score is found by bisection over those keys, each pass a
comparison and a count. The K-th largest is usually within 8 powers of two of the largest: 10 passes
for bf16 and 26 for fp32 find it there, fewer in fp32 when a key is found that exactly K keys reach;
else 15 and 31 find it anywhere. No sort, no shared-memory histogram, no atomics. Equal scores stay
by a running count from the lowest index.

Of scores with signs, negative ones have the key of zero while K are positive; else the keys are
moved so that those that matter are not negative.

**Pairs.** Keys of bf16 scores have 15 bits, so an int32 holds two of them, and flags of kept
neurons come in pairs, too (bit 0 and bit 16). Four keys are counted by four instructions: two
differences, one that gathers their highest bits as bytes of ones, and a sum of four bytes. That and
the largest of two bf16 numbers are assembly (PTX, for capability 8.0 and above), which only a GPU
runs; the interpreter has the same in integers, and ``tests/kernels/ptx_warp.py`` runs the assembly.

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
from mone_megatron.kernels.triton_scores import narrow_bits


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


@triton.constexpr_function
def pairs_at_once(pairs: int) -> int:
    """Returns how many pairs of a thread one piece of assembly takes.

    A thread has as many of them: see ``fused.selecting_shape``.
    """
    return max(1, min(8, pairs // 32))


@triton.constexpr_function
def operands(at_once: int, inputs: int) -> str:
    """Returns the constraints of an assembly of so many pairs, with so many inputs for each."""
    # An output is written before the last input is read.
    return ",".join(["=&r"] * at_once + ["r"] * (at_once * inputs))


@triton.constexpr_function
def assembly_of_counts(at_once: int) -> str:
    """Returns PTX that counts keys of at least a key (``$0``, other outputs 0), four at a time.

    A pair minus the least keeps the highest bit of a half whose key reaches it. ``prmt`` makes a
    byte of ones of such a bit, so -1, and ``dp4a`` adds four of them up.
    """
    lines = ["{", ".reg .b32 first, second, ones;", "mov.b32 ones, -1;", "mov.b32 $0, 0;"]
    least = f"${2 * at_once}"
    for pair in range(at_once, 2 * at_once, 2):
        lines.append(f"sub.s32 first, ${pair}, {least};")
        if at_once > 1:
            lines.append(f"sub.s32 second, ${pair + 1}, {least};")
        else:
            lines.append("mov.b32 second, 0;")
        lines.append("prmt.b32 first, first, second, 0xFDB9;")
        lines.append("dp4a.s32.s32 $0, first, ones, $0;")
    return "\n".join([*lines, *(f"mov.b32 ${other}, 0;" for other in range(1, at_once)), "}"])


@triton.constexpr_function
def assembly_of_largest(at_once: int) -> str:
    """Returns PTX that takes the larger bf16 of pairs (``$0``, other outputs 0); NaN is largest."""
    lines = ["{", f"mov.b32 $0, ${at_once};"]
    for pair in range(at_once + 1, 2 * at_once):
        lines.append(f"max.NaN.bf16x2 $0, $0, ${pair};")
    return "\n".join([*lines, *(f"mov.b32 ${other}, 0;" for other in range(1, at_once)), "}"])


@triton.jit
def positive_pairs(bits_P: tl.tensor) -> tl.tensor:
    """Returns pairs of bf16 bits with +0 in the place of negative numbers; NaN stays one."""
    if INTERPRETED:
        negative_P = (bits_P >> 15) & 0x10001
        large_P = (bits_P & 0x7FFF7FFF) + 0x7F007F
        nan_P = (large_P >> 15) & 0x10001
        kept_P = bits_P & ~((negative_P << 16) - negative_P)
        return kept_P | ((nan_P << 15) - nan_P)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;",
            "=r,r,r",
            [bits_P, 0],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def largest_key(pair_P: tl.tensor) -> tl.tensor:
    """Returns the largest of keys that are pairs; one above infinity's when one of them is NaN."""
    if not INTERPRETED:
        AT_ONCE: tl.constexpr = pairs_at_once(pair_P.shape[0])
        pair_P = tl.inline_asm_elementwise(
            assembly_of_largest(AT_ONCE),
            operands(AT_ONCE, 1),
            [pair_P],
            dtype=tl.int32,
            is_pure=True,
            pack=AT_ONCE,
        )
    return tl.max(tl.maximum(pair_P >> 16, pair_P & 0xFFFF), axis=0)


@triton.jit
def pairs_reached(guarded_P: tl.tensor, least: tl.tensor) -> tl.tensor:
    """Returns flags, in pairs, of keys of at least ``least``, a pair of the same key twice.

    The highest bit of each half of ``guarded_P`` is set: whether it is lost tells the order.
    """
    return ((guarded_P - least) >> 15) & 0x10001


@triton.jit
def count_pairs(guarded_P: tl.tensor, least: tl.tensor) -> tl.tensor:
    """Returns how many keys reach ``least``, a pair of the same key twice."""
    if INTERPRETED:
        count = tl.sum(pairs_reached(guarded_P, least), axis=0)
        return (count & 0xFFFF) + (count >> 16)
    else:  # noqa: RET505
        AT_ONCE: tl.constexpr = pairs_at_once(guarded_P.shape[0])
        count_P = tl.inline_asm_elementwise(
            assembly_of_counts(AT_ONCE),
            operands(AT_ONCE, 2),
            [guarded_P, least],
            dtype=tl.int32,
            is_pure=True,
            pack=AT_ONCE,
        )
        return tl.sum(count_P, axis=0)


@triton.jit
def count_from(keys: tl.tensor, least: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:
    """Returns how many keys reach ``least``, which narrow ones have twice."""
    return count_pairs(keys, least) if NARROW else tl.sum((keys >= least).to(tl.int32), axis=0)


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
def bisect(
    keys: tl.tensor,
    kth: tl.tensor,
    reached: tl.tensor,
    step: tl.tensor,
    k: tl.tensor,
    NARROW: tl.constexpr,
) -> tl.tensor:
    """Returns a key from ``kth`` on that ``k`` or more keys reach, and how many do.

    If they are more, it is the largest such key. Narrow keys are given and returned twice.
    """
    while (step >= (0x10001 if NARROW else 1)) & (reached != k):
        counted = count_from(keys, kth + step, NARROW)
        kth = tl.where(counted >= k, kth + step, kth)
        reached = tl.where(counted >= k, counted, reached)
        # The lower half of a narrow step has the same bit.
        step = step >> 1
    return kth, reached


@triton.jit
def search_everywhere(
    guarded_P: tl.tensor, k: tl.tensor, LANES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns what :func:`bisect` does, among all narrow keys; hardly any row needs it."""
    return bisect(guarded_P, k * 0, k * 0 + LANES, k * 0 + 0x40004000, k, True)


@triton.jit
def search_from(
    keys: tl.tensor,
    floor: tl.tensor,
    reached: tl.tensor,
    k: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the largest pair of a key that ``k`` or more narrow keys reach, and how many do.

    It is less than 8 powers of two above ``floor``, which ``reached`` keys reach, at least ``k``.
    """
    kth = floor
    for bit in tl.static_range(9, -1, -1):
        higher = kth + (0x10001 << bit)
        counted = count_pairs(keys, higher)
        kth = tl.where(counted >= k, higher, kth)
        reached = tl.where(counted >= k, counted, reached)
    return kth, reached


@triton.jit
def search_wide(
    keys: tl.tensor, top: tl.tensor, k: tl.tensor, LANES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns what :func:`bisect` does, of keys of 31 bits."""
    kth = tl.maximum(top - 0x3FFFFFF, 0)
    reached = count_from(keys, kth, False)
    near = reached >= k
    step = tl.where(near, 1 << 25, 1 << 30)
    kth = tl.where(near, kth, 0)
    reached = tl.where(near, reached, LANES)
    return bisect(keys, kth, reached, step, k, False)


@triton.jit
def wide_keys_with_signs(
    score_N: tl.tensor, inside_N: tl.tensor, k: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns keys of 31 bits, the largest, and whether a score is NaN.

    When ``k`` scores are not negative, all negative ones have the key 0, else all others have the
    same key above theirs.
    """
    bits_N = score_N.to(tl.int32, bitcast=True)
    # Zeros of both signs are equal; of other negative numbers a larger magnitude is less.
    order_N = tl.where((bits_N & 0x7FFFFFFF) == 0, 0, bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF))
    order_N = tl.where(score_N != score_N, 0x7FFFFFFF, order_N)
    order_N = tl.where(inside_N, order_N, -0x7FFFFFFF - 1)
    top = tl.max(order_N, axis=0)
    enough = tl.sum((order_N >= 0).to(tl.int32), axis=0) >= k
    most = tl.where(enough, 0x7F800000, -1)
    shift = tl.where(enough, 1, 0x7F800002)
    key_N = tl.maximum(tl.minimum(order_N, most) + shift, 0)
    return key_N, tl.minimum(top, most) + shift, top > 0x7F800000


@triton.jit
def largest_wide(
    score_N: tl.tensor, inside_N: tl.tensor, k: tl.tensor, SIGNED: tl.constexpr
) -> tl.tensor:
    """Returns what :func:`largest` does, of scores in fp32."""
    if SIGNED:
        key_N, top, nan = wide_keys_with_signs(score_N, inside_N, k)
    else:
        key_N = tl.where(inside_N, score_N.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        top = tl.max(key_N, axis=0)
        nan = top > 0x7F800000
    kth, reached = search_wide(key_N, top, k, score_N.shape[0])
    kept_P = pairs_from(key_N >= kth)
    if reached > k:
        kept_P = without_last(kept_P, pairs_from(key_N == kth), reached - k)
    return kept_P * (nan == 0).to(tl.int32)


@triton.jit
def keys_of_all_signs(bits_P: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Returns keys, in pairs, that order the bf16 numbers among which the ``k``-th largest is.

    When ``k`` numbers are positive, all others have the key 0; else all positive ones have the
    same, and others less, the least 127 more than 0.
    """
    size_P = bits_P & 0x7FFF7FFF
    negative_P = (bits_P >> 15) & 0x10001
    positive_P = ((size_P + 0x7FFF7FFF) >> 15) & 0x10001 & ~negative_P
    count = tl.sum(positive_P, axis=0)
    # Each flag becomes a half of ones.
    positive_P = (positive_P << 16) - positive_P
    others_P = 0x7FFE7FFE - (size_P & ~positive_P)
    enough = (count & 0xFFFF) + (count >> 16) >= k
    return tl.where(enough, size_P & positive_P, (others_P | positive_P) & 0x7FFF7FFF)


@triton.jit
def largest_of_pairs(
    bits_P: tl.tensor, k: tl.tensor, NEURONS: tl.constexpr, SIGNED: tl.constexpr
) -> tl.tensor:
    """Returns what :func:`largest` does, of bf16 numbers given as the bits of pairs."""
    PAIRS: tl.constexpr = bits_P.shape[0]
    key_P = positive_pairs(bits_P) if SIGNED else bits_P & 0x7FFF7FFF
    inside_P = tl.where(2 * tl.arange(0, PAIRS) + 1 < NEURONS, -1, 0)
    if NEURONS % 2 == 1:
        inside_P = tl.where(2 * tl.arange(0, PAIRS) + 1 == NEURONS, 0xFFFF, inside_P)
    if NEURONS < 2 * PAIRS:
        key_P = key_P & inside_P
    top = largest_key(key_P)
    # The keys of 8 powers of two.
    floor = tl.maximum(top - 0x3FF, 1 if SIGNED else 0) * 0x10001
    # Whether the difference of a key and another shows in the highest bit of its half.
    key_P = key_P | -0x7FFF8000
    reached = count_pairs(key_P, floor)
    if reached >= k:
        kth, reached = search_from(key_P, floor, reached, k)
    else:
        if SIGNED:
            key_P = keys_of_all_signs(bits_P, k)
            if NEURONS < 2 * PAIRS:
                key_P = key_P & inside_P
            key_P = key_P | -0x7FFF8000
        kth, reached = search_everywhere(key_P, k, 2 * PAIRS)
    nan = top > 0x7F80
    # No key reaches 0x8000.
    kept_P = pairs_reached(key_P, tl.where(nan, -0x7FFF8000, kth))
    if (reached > k) & (nan == 0):
        tied_P = kept_P ^ pairs_reached(key_P, kth + 0x10001)
        kept_P = without_last(kept_P, tied_P, reached - k)
    return kept_P


@triton.jit
def largest(
    score_N: tl.tensor,
    k: tl.tensor,
    NEURONS: tl.constexpr,
    SIGNED: tl.constexpr,
    NARROW: tl.constexpr,
) -> tl.tensor:
    """Returns flags, in pairs, of a row's ``k`` largest scores; none if one is NaN.

    Ties go to lower indices. ``NARROW`` scores are rounded to bf16 first.
    """
    if NARROW:
        kept_P = largest_of_pairs(bf16_pairs(score_N), k, NEURONS, SIGNED)
    else:
        inside_N = tl.arange(0, score_N.shape[0]) < NEURONS
        kept_P = largest_wide(score_N, inside_N, k, SIGNED)
    return kept_P


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
    if NARROW:
        even_P, odd_P = paired(score_N.to(tl.int16, bitcast=True))
        bits_P = (even_P.to(tl.int32) & 0xFFFF) | (odd_P.to(tl.int32) << 16)
        kept_P = largest_of_pairs(bits_P, k, NEURONS, True)
    else:
        kept_P = largest(score_N, k, NEURONS, True, NARROW)
    tl.store(mask + row * NEURONS + lane_N, lanes_of(kept_P).to(tl.int8), mask=inside_N)


@triton.jit
def activation_kernel(
    gate: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
) -> None:
    """Writes the int16 bits of bf16 activations as scores have them, to compare with torch's."""
    lane_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight_N = ACTIVATION(tl.load(gate + lane_N).to(tl.float32))
    tl.store(out + lane_N, (narrow_bits(weight_N) >> 16).to(tl.int16))
