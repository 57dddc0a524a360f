"""Computes experts for a few tokens in Triton, reading the rows of kept neurons only.

Four kernels over slots (a token once for each of its experts), in the order of the slots' experts,
so that rows which several tokens want are found in the L2 cache:

1. :func:`project_kernel`: gate values of all neurons, a few rows of the weights a program.
2. :func:`choose_kernel`: the K largest scores, exactly (:mod:`.triton_select`), and their neurons'
   numbers and weights side by side. One program a slot.
3. :func:`up_kernel`: the up rows of those neurons times the token, times the weights.
4. :func:`down_kernel`: the weighted sum of their down rows, in parts of the kept neurons, so that
   there are programs enough for a GPU with one token only.

Every shape follows from the number of tokens, and nothing waits for the host: a step can be
captured as a CUDA graph. Sums are fp32; gate values are rounded to the weights' dtype before they
are ranked, as the dense path rounds them.

Shape suffixes: S slots, F neurons of an expert, K kept of them, H hidden size, R rows of one
program, N lanes of one program, P parts of the kept neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mone_megatron.kernels.triton_select import lanes_of, largest


@triton.jit
def _dot_rows(
    tokens: tl.tensor,
    weight: tl.tensor,
    token: tl.tensor,
    expert: tl.tensor,
    slot: tl.tensor,
    neuron_R: tl.tensor,
    inside_R: tl.tensor,
    hidden_size: tl.tensor,
    expert_stride: tl.tensor,
    neuron_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns fp32 products, ``[R]``, of a slot's token and rows of neurons of its expert."""
    # The weights of all experts together can have more than 2**31 values: offsets are 64-bit.
    base = weight + tl.load(expert + slot).to(tl.int64) * expert_stride
    row_R = base + neuron_R.to(tl.int64) * neuron_stride
    start = tokens + tl.load(token + slot).to(tl.int64) * hidden_size
    lane_N = tl.arange(0, BLOCK)
    sum_RN = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(0, hidden_size, BLOCK):
        inside_N = first + lane_N < hidden_size
        token_N = tl.load(start + first + lane_N, mask=inside_N, other=0.0).to(tl.float32)
        weight_RN = tl.load(
            row_R[:, None] + (first + lane_N)[None, :],
            mask=inside_R[:, None] & inside_N[None, :],
            other=0.0,
        ).to(tl.float32)
        sum_RN += weight_RN * token_N[None, :]
    return tl.sum(sum_RN, axis=1)


@triton.jit
def project_kernel(
    # [N, H]; [E, F, H]; by slot: its token and expert.
    tokens: tl.tensor,
    weight: tl.tensor,
    token: tl.tensor,
    expert: tl.tensor,
    # Written: [S, F].
    values: tl.tensor,
    hidden_size: tl.tensor,
    neurons: tl.tensor,
    expert_stride: tl.tensor,
    neuron_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gate or up values of all neurons of each slot, ``[S, F]``.

    Grid: slots fastest, so that slots of an expert read its rows at about the same time; then
    ceil(F / ROWS).
    """
    slot = tl.program_id(0)
    neuron_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_R = neuron_R < neurons
    value_R = _dot_rows(
        tokens, weight, token, expert, slot, neuron_R, inside_R,
        hidden_size, expert_stride, neuron_stride, ROWS, BLOCK,
    )  # fmt: skip
    place_R = values + slot.to(tl.int64) * neurons + neuron_R
    tl.store(place_R, value_R.to(values.dtype.element_ty), mask=inside_R)


@triton.jit
def choose_kernel(
    # [S, F]; up and scores may be None; [S].
    gate: tl.tensor,
    up: tl.tensor,
    scores: tl.tensor,
    scale: tl.tensor,
    # Written: [S, K] each, neurons in rising order.
    chosen: tl.tensor,
    weights: tl.tensor,
    k: tl.tensor,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCORE: tl.constexpr,
    SIGNED: tl.constexpr,
    NARROW: tl.constexpr,
) -> None:
    """Writes each slot's kept neurons and their weights. Grid: slots.

    Weights are a times the router's weight (times u where it is given).
    """
    slot = tl.program_id(0).to(tl.int64)
    lane_N = tl.arange(0, BLOCK)
    inside_N = lane_N < NEURONS
    gate_N = tl.load(gate + slot * NEURONS + lane_N, mask=inside_N, other=0.0).to(tl.float32)
    activation_N = ACTIVATION(gate_N)
    weight_N = activation_N
    up_N = gate_N
    if up is not None:
        up_N = tl.load(up + slot * NEURONS + lane_N, mask=inside_N, other=0.0).to(tl.float32)
        weight_N = weight_N * up_N
    if scores is not None:
        score_N = tl.load(scores + slot * NEURONS + lane_N, mask=inside_N, other=0.0)
        score_N = score_N.to(tl.float32)
    else:
        score_N = SCORE(gate_N, up_N, activation_N, NARROW)
    flag_N = lanes_of(largest(score_N, k, NEURONS, SIGNED, NARROW))
    # A NaN keeps nothing: then the first K stand for all of them, with NaN as their weights.
    found = tl.sum(flag_N, axis=0)
    kept_N = (flag_N != 0) | ((found == 0) & (lane_N < k))
    weight_N = tl.where(found == 0, float("nan"), weight_N * tl.load(scale + slot).to(tl.float32))
    # 64 bits are for the slot alone: lanes add up in 32.
    first = slot * k
    place_N = tl.cumsum(kept_N.to(tl.int32), axis=0) - 1
    tl.store(chosen + first + place_N, lane_N, mask=kept_N)
    tl.store(weights + first + place_N, weight_N, mask=kept_N)


@triton.jit
def up_kernel(
    # [N, H]; [E, F, H]; by slot: its token and expert; [S, K].
    tokens: tl.tensor,
    weight: tl.tensor,
    token: tl.tensor,
    expert: tl.tensor,
    chosen: tl.tensor,
    # Read and written: [S, K], times the up values afterwards.
    weights: tl.tensor,
    hidden_size: tl.tensor,
    k: tl.tensor,
    expert_stride: tl.tensor,
    neuron_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Multiplies the weights of kept neurons by their up values. Grid: slots, ceil(K / ROWS)."""
    slot = tl.program_id(0)
    place_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside_R = place_R < k
    place_R = slot.to(tl.int64) * k + place_R
    neuron_R = tl.load(chosen + place_R, mask=inside_R, other=0)
    up_R = _dot_rows(
        tokens, weight, token, expert, slot, neuron_R, inside_R,
        hidden_size, expert_stride, neuron_stride, ROWS, BLOCK,
    )  # fmt: skip
    weight_R = tl.load(weights + place_R, mask=inside_R, other=0.0)
    tl.store(weights + place_R, weight_R * up_R, mask=inside_R)


@triton.jit
def down_kernel(
    # [E, F, H]; by slot: its expert, and where its output goes; [S, K] each.
    weight: tl.tensor,
    expert: tl.tensor,
    order: tl.tensor,
    chosen: tl.tensor,
    weights: tl.tensor,
    # Written: [S, P, H] fp32.
    output: tl.tensor,
    hidden_size: tl.tensor,
    k: tl.tensor,
    expert_stride: tl.tensor,
    neuron_stride: tl.tensor,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes weighted sums of down rows, in parts. Grid: slots, ceil(H / BLOCK), parts."""
    slot = tl.program_id(0)
    lane_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(2)
    inside_N = lane_N < hidden_size
    base = weight + tl.load(expert + slot).to(tl.int64) * expert_stride
    each = tl.cdiv(k, PARTS)
    first, end = part * each, tl.minimum(k, (part + 1) * each)
    sum_RN = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(first, end, ROWS):
        place_R = start + tl.arange(0, ROWS)
        inside_R = place_R < end
        place_R = slot.to(tl.int64) * k + place_R
        neuron_R = tl.load(chosen + place_R, mask=inside_R, other=0)
        weight_R = tl.load(weights + place_R, mask=inside_R, other=0.0)
        row_RN = tl.load(
            (base + neuron_R.to(tl.int64) * neuron_stride)[:, None] + lane_N[None, :],
            mask=inside_R[:, None] & inside_N[None, :],
            other=0.0,
        ).to(tl.float32)
        sum_RN += weight_R[:, None] * row_RN
    place = tl.load(order + slot).to(tl.int64) * PARTS + part
    tl.store(output + place * hidden_size + lane_N, tl.sum(sum_RN, axis=0), mask=inside_N)
