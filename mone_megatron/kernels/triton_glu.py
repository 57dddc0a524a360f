"""Fuses selection, gated linear unit and router weight in Triton: one pass forward, one back.

**Forward.** One program takes ``ROWS`` consecutive rows, one after the other, each whole in
registers: gate and up are read once, the K-th largest score is bisected (:mod:`.triton_select`),
and hidden values, the mask as bits and, in packed memory mode, the kept gate and up values are
written. 6 bytes a neuron move in bf16, against 2 in and 1 out for a mask alone.

**Statistics** of the balance loss ride along: a program adds weights and counts of its rows in
registers and writes them when the segment changes. Rows are taken in the order of their segments
(``order`` when they do not lie so), so program p and segment s meet once, and (p, s) pairs are
written at slot p + s, which grows along the rows: no slot is used twice, no atomics are needed,
and sums are taken in the same order each time (:func:`segment_sums` adds the slots of a segment).

**Backward** computes everything again from gate, up and the bits (or from packed values, which it
gathers); rows are independent. Unselected entries are multiplied by zero rather than skipped, so
that NaN spreads as in the reference.

**Layout.** Lanes run along the neurons, so loads and stores coalesce, whatever the row stride
(gate and up are usually the halves of one matrix). Row offsets are 64-bit, everything within a row
32-bit. Bits are bytes of 8 neurons, lowest bit first: with 16-byte loads of bf16 a byte's neurons
lie in one thread. Arithmetic is fp32.

**Launch.** Forward, a warp holds a row of up to 1,024 bf16 neurons (512 in fp32), 32 (16) a thread,
so that no count waits for another warp; wider rows take more warps, and wait. Backward counts
nothing: 8 lanes a thread (``fused.selecting_shape`` and ``launch_shape``). docs/gpu.md has the
registers and instructions of each. The shape is a function of the width alone, not autotuned:
choosing by timing would add rows up in another order in the next run, and two runs of one seed
would part. The width itself is a constant of the kernel, so that lanes which no row has cost
nothing.

Arguments that a variant does not need are None, and the compiler drops what they guard.

Shape suffixes: N lanes of one program, P pairs of lanes, B bytes of N bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mone_megatron.kernels.triton_scores import widened
from mone_megatron.kernels.triton_select import (
    lanes_of,
    largest,
    ones_of,
    pairs_from,
)

# Divisors are not smaller: the smallest normal number of fp32.
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def bits_of(kept_P: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Returns bytes of 8 neurons each, the first in the lowest bit, from pairs of flags."""
    kept_B4 = tl.reshape(kept_P, [BLOCK // 8, 4])
    both_B = tl.sum(kept_B4 << (2 * tl.arange(0, 4))[None, :], axis=1)
    return ((both_B | (both_B >> 15)) & 0xFF).to(tl.uint8)


@triton.jit
def kept_from(bits_B: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Returns 1 at kept neurons and 0 at others, int32: undoes :func:`bits_of`."""
    kept_B8 = (bits_B.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(kept_B8, [BLOCK])


@triton.jit
def leave_sums(
    weight_slots: tl.tensor,
    count_slots: tl.tensor,
    slot: tl.tensor,
    weight_sum_N: tl.tensor,
    count_P: tl.tensor,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the sums of weights and the counts, in pairs, of one program and segment."""
    lane_N = tl.arange(0, BLOCK)
    at_N = slot * NEURONS + lane_N
    tl.store(weight_slots + at_N, weight_sum_N, mask=lane_N < NEURONS)
    tl.store(count_slots + at_N, lanes_of(count_P), mask=lane_N < NEURONS)


# What changes from call to call must not make another kernel.
@triton.jit(do_not_specialize=["rows", "k", "packed_width"])
def forward_kernel(
    # [T, F] each but scale [T]; scores: see .triton_select; mask: bytes, 1 at kept neurons.
    gate: tl.tensor,
    up: tl.tensor,
    scale: tl.tensor,
    scores: tl.tensor,
    mask: tl.tensor,
    # Written: [T, F], [T, ceil(F/8)] and, in packed mode, [T, K] each.
    hidden: tl.tensor,
    bits: tl.tensor,
    packed_gate: tl.tensor,
    packed_up: tl.tensor,
    # [T]: the row at each position in segment order, its segment; 1 / sum of weights, by row.
    order: tl.tensor,
    segment: tl.tensor,
    share: tl.tensor,
    # [slots, F] fp32 and int32.
    weight_slots: tl.tensor,
    count_slots: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    packed_width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    scores_stride: tl.tensor,
    NEURONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    # Of the neurons a row keeps: "all", "mask" (given) or "top" (selected here).
    KEEP: tl.constexpr,
    SCORE: tl.constexpr,
    SIGNED: tl.constexpr,
    NARROW: tl.constexpr,
    # Of the balance loss: over "selected" or "all" NEURONS, divided by the row's sum or not.
    WEIGHTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    """Writes hidden values, bits and sums of ROWS rows, as asked. Grid: ceil(rows / ROWS)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * ROWS
    lane_N = tl.arange(0, BLOCK)
    inside_N = lane_N < NEURONS
    weight_sum_N = tl.zeros([BLOCK], dtype=tl.float32)
    count_P = tl.zeros([BLOCK // 2], dtype=tl.int32)
    current = tl.load(segment + first) if segment is not None else 0
    for position in range(first, tl.minimum(first + ROWS, rows)):
        row = tl.load(order + position).to(tl.int64) if order is not None else position
        gate_in_N = tl.load(gate + row * gate_stride + lane_N, mask=inside_N, other=0.0)
        up_in_N = tl.load(up + row * up_stride + lane_N, mask=inside_N, other=0.0)
        gate_N = widened(gate_in_N)
        up_N = widened(up_in_N)
        weight_N = ACTIVATION(gate_N)
        if KEEP == "top":
            if SCORE is None:
                score_at = scores + row * scores_stride
                score_N = widened(tl.load(score_at + lane_N, mask=inside_N, other=0.0))
            else:
                score_N = SCORE(gate_N, up_N, weight_N, NARROW)
            kept_P = largest(score_N, k, NEURONS, SIGNED, NARROW)
        elif KEEP == "mask":
            kept_P = pairs_from(tl.load(mask + row * NEURONS + lane_N, mask=inside_N, other=0))
        else:
            kept_P = pairs_from(inside_N)
        value_N = weight_N * up_N
        if KEEP != "all":
            value_N = value_N * ones_of(kept_P)
        if scale is not None:
            value_N = value_N * tl.load(scale + row).to(tl.float32)
        hidden_at = hidden + row * NEURONS
        tl.store(hidden_at + lane_N, value_N.to(hidden.dtype.element_ty), mask=inside_N)
        if bits is not None:
            byte_B = tl.arange(0, BLOCK // 8)
            width = (NEURONS + 7) // 8
            tl.store(bits + row * width + byte_B, bits_of(kept_P, BLOCK), mask=byte_B < width)
        if packed_gate is not None:
            flags_N = lanes_of(kept_P)
            place_N = tl.cumsum(flags_N, axis=0) - flags_N
            fits_N = (flags_N != 0) & (place_N < packed_width)
            packed_at = row * packed_width
            tl.store(packed_gate + packed_at + place_N, gate_in_N, mask=fits_N)
            tl.store(packed_up + packed_at + place_N, up_in_N, mask=fits_N)
        if segment is not None:
            now = tl.load(segment + position)
            if now != current:
                slot = program + current
                leave_sums(weight_slots, count_slots, slot, weight_sum_N, count_P, NEURONS, BLOCK)
                weight_sum_N = tl.zeros([BLOCK], dtype=tl.float32)
                count_P = tl.zeros([BLOCK // 2], dtype=tl.int32)
                current = now
            # Sigmoid of a lane beyond the end is not zero.
            counted_N = tl.where(inside_N, tl.abs(weight_N), 0.0)
            if WEIGHTS == "selected":
                counted_N = counted_N * ones_of(kept_P)
            if NORMALIZE:
                total = tl.sum(counted_N, axis=0)
                inverse = tl.div_rn(1.0, tl.where(total < _TINY, _TINY, total))
                tl.store(share + row, inverse)
                counted_N = counted_N * inverse
            weight_sum_N += counted_N
            count_P += kept_P
    if segment is not None:
        slot = program + current
        leave_sums(weight_slots, count_slots, slot, weight_sum_N, count_P, NEURONS, BLOCK)


@triton.jit(do_not_specialize=["packed_width"])
def rebuild_kernel(
    # [T, K] each, [T], [T, ceil(F/8)].
    packed_gate: tl.tensor,
    packed_up: tl.tensor,
    scale: tl.tensor,
    bits: tl.tensor,
    # Written: [T, F].
    hidden: tl.tensor,
    packed_width: tl.tensor,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """Writes hidden values once more, from packed values. One program a row. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane_N = tl.arange(0, BLOCK)
    byte_B = tl.arange(0, BLOCK // 8)
    width = (NEURONS + 7) // 8
    bits_B = tl.load(bits + row * width + byte_B, mask=byte_B < width, other=0)
    kept_N = kept_from(bits_B, BLOCK)
    place_N = row * packed_width + tl.cumsum(kept_N, axis=0) - kept_N
    gate_N = tl.load(packed_gate + place_N, mask=kept_N != 0, other=0.0).to(tl.float32)
    up_N = tl.load(packed_up + place_N, mask=kept_N != 0, other=0.0).to(tl.float32)
    value_N = ACTIVATION(gate_N) * up_N * kept_N.to(tl.float32)
    if scale is not None:
        value_N = value_N * tl.load(scale + row).to(tl.float32)
    at = hidden + row * NEURONS
    tl.store(at + lane_N, value_N.to(hidden.dtype.element_ty), mask=lane_N < NEURONS)


@triton.jit
def segment_sums(
    # [S + 1]: where each segment starts in segment order.
    starts: tl.tensor,
    weight_slots: tl.tensor,
    count_slots: tl.tensor,
    # Written: [S, F] fp32.
    weight_sum: tl.tensor,
    kept: tl.tensor,
    neurons: tl.tensor,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Adds the slots of one segment for BLOCK neurons, SLOTS at a time. Grid: S, blocks."""
    segment = tl.program_id(0).to(tl.int64)
    lane_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_N = lane_N < neurons
    start = tl.load(starts + segment).to(tl.int64)
    end = tl.load(starts + segment + 1).to(tl.int64)
    weight_N = tl.zeros([BLOCK], dtype=tl.float32)
    count_N = tl.zeros([BLOCK], dtype=tl.int32)
    # A segment without rows has no slots: end == start gives an empty range.
    first = start // ROWS
    last = tl.where(end > start, (end - 1) // ROWS + 1, first)
    for block in range(first, last, SLOTS):
        program_L = block + tl.arange(0, SLOTS)
        at = (program_L + segment)[:, None] * neurons + lane_N[None, :]
        used = (program_L < last)[:, None] & inside_N[None, :]
        weight_N += tl.sum(tl.load(weight_slots + at, mask=used, other=0.0), axis=0)
        count_N += tl.sum(tl.load(count_slots + at, mask=used, other=0), axis=0)
    at = segment * neurons + lane_N
    tl.store(weight_sum + at, weight_N, mask=inside_N)
    tl.store(kept + at, count_N.to(tl.float32), mask=inside_N)


@triton.jit
def backward_kernel(
    # Gradients of hidden [T, F] and of the sums [S, F] (fp32); one may be None.
    grad_hidden: tl.tensor,
    grad_sum: tl.tensor,
    # [T, F], or [T, K] in packed mode; scale [T]; bits [T, ceil(F/8)].
    gate: tl.tensor,
    up: tl.tensor,
    scale: tl.tensor,
    bits: tl.tensor,
    # [T]: segment of each row, and 1 / sum of its weights.
    segment: tl.tensor,
    share: tl.tensor,
    # Written: [T, F] each, and [T].
    grad_gate: tl.tensor,
    grad_up: tl.tensor,
    grad_scale: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    grad_hidden_stride: tl.tensor,
    grad_stride: tl.tensor,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    """Writes the gradients of gate, up and scale. One program a row. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane_N = tl.arange(0, BLOCK)
    inside_N = lane_N < NEURONS
    gate_at = gate + row * gate_stride
    up_at = up + row * up_stride
    kept_N = inside_N.to(tl.int32)
    if bits is not None:
        byte_B = tl.arange(0, BLOCK // 8)
        width = (NEURONS + 7) // 8
        bits_B = tl.load(bits + row * width + byte_B, mask=byte_B < width, other=0)
        kept_N = kept_from(bits_B, BLOCK)
    if PACKED:
        place_N = tl.cumsum(kept_N, axis=0) - kept_N
        gate_N = tl.load(gate_at + place_N, mask=kept_N != 0, other=0.0).to(tl.float32)
        up_N = tl.load(up_at + place_N, mask=kept_N != 0, other=0.0).to(tl.float32)
    else:
        gate_N = tl.load(gate_at + lane_N, mask=inside_N, other=0.0).to(tl.float32)
        up_N = tl.load(up_at + lane_N, mask=inside_N, other=0.0).to(tl.float32)
    weight_N, slope_N = SLOPE(gate_N)
    share_of_N = kept_N.to(tl.float32)
    grad_weight_N = tl.zeros([BLOCK], dtype=tl.float32)
    grad_up_N = tl.zeros([BLOCK], dtype=tl.float32)
    if grad_hidden is not None:
        grad_at = grad_hidden + row * grad_hidden_stride
        grad_N = tl.load(grad_at + lane_N, mask=inside_N, other=0.0).to(tl.float32) * share_of_N
        if scale is not None:
            total = tl.sum(grad_N * weight_N * up_N, axis=0)
            tl.store(grad_scale + row, total.to(grad_scale.dtype.element_ty))
            grad_N = grad_N * tl.load(scale + row).to(tl.float32)
        grad_weight_N = grad_N * up_N
        grad_up_N = grad_N * weight_N
    if grad_sum is not None:
        sum_at = grad_sum + tl.load(segment + row).to(tl.int64) * NEURONS
        sum_slope_N = tl.load(sum_at + lane_N, mask=inside_N, other=0.0)
        counted_N = inside_N.to(tl.float32) if WEIGHTS == "all" else share_of_N
        if NORMALIZE:
            inverse = tl.load(share + row)
            # d/dw_j of sum_k c_k w_k / s is (c_j - sum_k c_k w_k / s) / s; s does not move where
            # it is clamped.
            mean = tl.sum(sum_slope_N * tl.abs(weight_N) * counted_N, axis=0) * inverse
            mean = tl.where(inverse < 1.0 / _TINY, mean, 0.0)
            sum_slope_N = (sum_slope_N - mean) * inverse
        sign_N = tl.where(weight_N > 0, 1.0, tl.where(weight_N < 0, -1.0, 0.0))
        grad_weight_N += sum_slope_N * sign_N * counted_N
    kind = grad_gate.dtype.element_ty
    at = row * grad_stride
    tl.store(grad_gate + at + lane_N, (grad_weight_N * slope_N).to(kind), mask=inside_N)
    tl.store(grad_up + at + lane_N, grad_up_N.to(kind), mask=inside_N)
