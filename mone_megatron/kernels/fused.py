"""Runs the Triton kernels under autograd: selection, gated unit and balance sums in one pass.

Imported only where Triton is (see :mod:`.ops`). Tensors are on CUDA, or on CPU under Triton's
interpreter, which the tests use.

Saved for the backward pass: in full mode gate and up (views of what the caller has) and the mask as
bits; in packed mode the kept values of both and the bits. With the balance sums also one number a
row.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor

from mone_megatron.kernels.reference import (
    Activate,
    Keep,
    Packed,
    TopK,
    WeightSums,
    neuron_scores,
)
from mone_megatron.kernels.triton_activations import FusedActivation
from mone_megatron.kernels.triton_glu import (
    backward_kernel,
    forward_kernel,
    rebuild_kernel,
    segment_sums,
)
from mone_megatron.kernels.triton_select import activation_kernel, topk_mask_kernel
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.registry import imported
from mone_megatron.methods.scores import SCORES

# Widest row that one program holds. In fp32 wider ones than 8192 compile for more than a minute and
# spill registers; torch computes with them.
MOST_NEURONS = {torch.bfloat16: 16384, torch.float32: 8192}
# Programs that add up the balance sums: enough to fill a GPU, few enough that their partial sums
# are small beside the rows.
_SUMMING_PROGRAMS = 1024
_MOST_ROWS = 64
# Rows of up to so many bf16 neurons lie 32 a thread; a program of more would not fit.
_MOST_BY_THIRTY_TWO = 8192
_expected_rows: int | None = None


def expect_rows(rows: int | None) -> None:
    """Fixes how many rows a program of the balance sums takes, for the rest of this process.

    How many suits depends on the number of rows, and each choice is another kernel: where experts
    are used unevenly, one rank would compile in the middle of a run while all others wait.

    Args:
        rows: what a call usually has; None chooses at each call.
    """
    global _expected_rows
    _expected_rows = rows


def compiled_variants() -> int:
    """Returns how many variants of the kernels of training this process has compiled or loaded."""
    kernels = (forward_kernel, backward_kernel, rebuild_kernel, segment_sums, topk_mask_kernel,
               activation_kernel)  # fmt: skip
    return sum(len(kinds[0]) for kernel in kernels for kinds in kernel.device_caches.values())


class LaunchShape(NamedTuple):
    """Holds the lanes of a program, and the warps they are spread over."""

    block: int
    warps: int


def launch_shape(neurons: int, lanes: int = 8) -> LaunchShape:
    """Returns so many lanes a thread, and up to 16 warps."""
    block = max(32, triton.next_power_of_2(neurons))
    return LaunchShape(block, min(16, max(1, block // (32 * lanes))))


def selecting_shape(neurons: int, dtype: torch.dtype, *, most: bool = False) -> LaunchShape:
    """Returns the launch shape of kernels that select: see :mod:`.triton_glu`.

    Args:
        neurons: the width of a row.
        dtype: of the scores.
        most: whether the kernel also packs and adds up, which takes more registers.
    """
    wide = dtype is torch.bfloat16 and neurons <= _MOST_BY_THIRTY_TWO and not most
    shape = launch_shape(neurons, 32 if wide else 16)
    # Assembly counts so many lanes of a thread at once, and finds no fewer.
    assert shape.block // (32 * shape.warps) >= min(16, shape.block // 32), shape
    return shape


@cache
def fused_activation(activate: Activate) -> FusedActivation | None:
    """Returns the kernels' forms of a function; None when no registered activation is it."""
    for activation in ACTIVATIONS:
        if activation.function is activate and activation.fused is not None:
            return cast(FusedActivation, imported(activation.fused))
    return None


@cache
def fused_score(name: str) -> triton.JITFunction | None:
    """Returns the kernels' form of a score; None when torch has to compute it."""
    fused = SCORES[name].fused
    return None if fused is None else imported(fused)


def supports(gate_TF: Tensor, up_TF: Tensor, activate: Activate) -> bool:
    """Returns whether the kernels know these dtypes, this width and this activation."""
    return (
        up_TF.dtype is gate_TF.dtype
        and gate_TF.shape[-1] <= MOST_NEURONS.get(gate_TF.dtype, 0)
        and fused_activation(activate) is not None
    )


@cache
def scores_equal_torch(activate: Activate, device: torch.device) -> bool:
    """Returns whether the kernels' bf16 activation is torch's, for every bf16 number.

    Both are computed on ``device``. NaN counts as equal to NaN. Subnormal numbers are left out: an
    activation that small is never among the K largest unless nearly all are zero.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    gate = bits.view(torch.bfloat16)
    fused = fused_activation(activate)
    assert fused is not None
    expected = activate(gate)
    subnormal = gate.float().abs() < torch.finfo(torch.float32).tiny
    # Large gates change how their whole row is computed: once apart from others, once among them.
    for block in (1024,) if triton.knobs.runtime.interpret else (32, 1024):
        ours = torch.empty_like(bits)
        activation_kernel[(len(bits) // block,)](gate, ours, BLOCK=block, ACTIVATION=fused.value)
        same = (ours == expected.view(torch.int16)) | expected.isnan()
        if not (same | subnormal).all():
            return False
    return True


def given_scores(gate_TF: Tensor, up_TF: Tensor, score: str, activate: Activate) -> Tensor | None:
    """Returns torch's scores where the kernel has none that is torch's in every bit; else None.

    A kernel's own score differs when it takes an activation that torch computes otherwise.
    """
    fused = fused_activation(activate)
    assert fused is not None
    exact = fused.exact or not SCORES[score].reads_activation
    if fused_score(score) is not None and (
        exact or (gate_TF.dtype is torch.bfloat16 and scores_equal_torch(activate, gate_TF.device))
    ):
        return None
    return neuron_scores(gate_TF, up_TF, score, activate)


def left_to_torch(gate_TF: Tensor, up_TF: Tensor, keep: Keep, activate: Activate) -> str | None:
    """Returns in words what torch computes of a gated unit in the kernels' place; None for nothing.

    It begins with the key that it follows from.
    """
    dtype, neurons = gate_TF.dtype, gate_TF.shape[-1]
    kind = str(dtype).removeprefix("torch.")
    if fused_activation(activate) is None:
        return "model.activation: it has no form in Triton, so torch computes the gated units"
    if neurons > MOST_NEURONS.get(dtype, 0):
        return (
            f"model.expert_ffn_hidden_size: rows of {neurons} neurons in {kind} on a rank are left "
            f"to torch (the kernels hold {MOST_NEURONS[torch.float32]} in fp32, "
            f"{MOST_NEURONS[torch.bfloat16]} in bf16)"
        )
    if isinstance(keep, TopK) and given_scores(gate_TF, up_TF, keep.score, activate) is not None:
        if fused_score(keep.score) is None:
            why = "it has no form in Triton"
        else:
            why = f"a kernel's would not be torch's to the last bit in {kind}"
        return f"mone.score={keep.score}: torch computes the scores, for {why}"
    return None


def topk_mask(scores_TF: Tensor, k: int) -> Tensor:
    """Returns the mask of :func:`mone_megatron.kernels.reference.topk_mask`, bit for bit."""
    scores_TF = _rows(scores_TF.detach())
    if scores_TF.dtype not in MOST_NEURONS:
        scores_TF = scores_TF.float()
    rows, neurons = scores_TF.shape
    mask_TF = torch.empty(rows, neurons, dtype=torch.bool, device=scores_TF.device)
    if rows:
        block, warps = selecting_shape(neurons, scores_TF.dtype)
        topk_mask_kernel[(rows,)](
            scores_TF,
            mask_TF.view(torch.int8),
            k,
            scores_TF.stride(0),
            NEURONS=neurons,
            BLOCK=block,
            NARROW=scores_TF.dtype is torch.bfloat16,
            num_warps=warps,
        )
    return mask_TF


def _rows(tensor: Tensor) -> Tensor:
    """Returns the tensor with neurons side by side, as kernels need; any row stride will do."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class _Settings:
    """Holds the settings of one call, without tensors that autograd should see."""

    activate: Activate
    keep: Tensor | TopK | None
    sums: WeightSums | None


class _FusedGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        settings: _Settings,
        packed: Packed | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        gate_TF, up_TF = _rows(gate_TF), _rows(up_TF)
        rows, neurons = gate_TF.shape
        keep, sums = settings.keep, settings.sums
        fused = fused_activation(settings.activate)
        assert fused is not None, "asked of supports()"
        saving = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        new = gate_TF.new_empty
        hidden_TF = new(rows, neurons)
        bits = packed_gate = packed_up = scores_TF = mask_TF = None
        if keep is not None and saving:
            bits = new(rows, -(-neurons // 8), dtype=torch.uint8)
            if packed is not None:
                # Halves of one tensor would be aligned or not by the number of rows, and each is
                # another kernel.
                packed_gate, packed_up = (new(rows, packed.width) for _ in range(2))
        if isinstance(keep, TopK):
            scores_TF = given_scores(gate_TF, up_TF, keep.score, settings.activate)
        elif keep is not None:
            mask_TF = keep.contiguous().view(torch.int8)
        share_T = weight_sum_SF = kept_SF = None
        slots = _Slots(gate_TF, sums) if sums is not None else None
        if slots is not None and sums is not None and sums.normalize:
            share_T = new(rows, dtype=torch.float32)
        most = packed_gate is not None and sums is not None
        block, warps = selecting_shape(neurons, gate_TF.dtype, most=most)
        rows_each = slots.rows_each if slots is not None else max(1, 512 // block)
        if rows:
            forward_kernel[(triton.cdiv(rows, rows_each),)](
                gate_TF,
                up_TF,
                scale_T,
                scores_TF,
                mask_TF,
                hidden_TF,
                bits,
                packed_gate,
                packed_up,
                slots.order_T if slots is not None else None,
                slots.segment_T if slots is not None else None,
                share_T,
                slots.weights if slots is not None else None,
                slots.counts if slots is not None else None,
                rows,
                keep.k if isinstance(keep, TopK) else 0,
                packed.width if packed is not None else 0,
                gate_TF.stride(0),
                up_TF.stride(0),
                scores_TF.stride(0) if scores_TF is not None else 0,
                NEURONS=neurons,
                ROWS=rows_each,
                BLOCK=block,
                ACTIVATION=fused.value,
                KEEP="top" if isinstance(keep, TopK) else "all" if keep is None else "mask",
                SCORE=_score(keep, given=scores_TF is not None),
                SIGNED=isinstance(keep, TopK) and SCORES[keep.score].signed,
                NARROW=(gate_TF if scores_TF is None else scores_TF).dtype is torch.bfloat16,
                WEIGHTS=sums.weights if sums is not None else "selected",
                NORMALIZE=sums is not None and sums.normalize,
                num_warps=warps,
            )
        if slots is not None:
            weight_sum_SF, kept_SF = slots.add_up()
            ctx.mark_non_differentiable(kept_SF)
        if packed_gate is not None and packed_up is not None and bits is not None:
            assert packed is not None
            gate_TF, up_TF = packed_gate, packed_up
            packed.rebuild = partial(
                _rebuild, packed_gate, packed_up, scale_T, bits, neurons, fused
            )
        ctx.save_for_backward(
            gate_TF,
            up_TF,
            scale_T,  # type: ignore[arg-type]
            bits,  # type: ignore[arg-type]
            sums.segment_T if sums is not None else None,  # type: ignore[arg-type]
            share_T,  # type: ignore[arg-type]
        )
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.neurons = settings, neurons  # type: ignore[attr-defined]
        ctx.packed = packed_gate is not None  # type: ignore[attr-defined]
        return hidden_TF, weight_sum_SF, kept_SF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_hidden_TF: Tensor | None,
        grad_sum_SF: Tensor | None,
        _: None,
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        gate, up, scale_T, bits, segment_T, share_T = ctx.saved_tensors  # type: ignore[attr-defined]
        settings: _Settings = ctx.settings  # type: ignore[attr-defined]
        fused = fused_activation(settings.activate)
        assert fused is not None, "asked of supports()"
        rows, neurons = gate.shape[0], ctx.neurons  # type: ignore[attr-defined]
        # Halves of one matrix, as gate and up are.
        grad_gate_TF, grad_up_TF = gate.new_empty(rows, 2 * neurons).chunk(2, dim=-1)
        grad_scale_T = torch.zeros_like(scale_T) if scale_T is not None else None
        if grad_hidden_TF is not None:
            grad_hidden_TF = _rows(grad_hidden_TF)
        # What is gathered takes more barriers the more warps there are, and fewer registers.
        packed: bool = ctx.packed  # type: ignore[attr-defined]
        block, warps = launch_shape(neurons, 16 if packed else 8)
        if rows:
            backward_kernel[(rows,)](
                grad_hidden_TF,
                grad_sum_SF.contiguous() if grad_sum_SF is not None else None,
                gate,
                up,
                scale_T,
                bits,
                segment_T if grad_sum_SF is not None else None,
                share_T if grad_sum_SF is not None else None,
                grad_gate_TF,
                grad_up_TF,
                grad_scale_T,
                gate.stride(0),
                up.stride(0),
                grad_hidden_TF.stride(0) if grad_hidden_TF is not None else 0,
                grad_gate_TF.stride(0),
                NEURONS=neurons,
                BLOCK=block,
                SLOPE=fused.value_and_slope,
                PACKED=packed,
                WEIGHTS=settings.sums.weights if settings.sums is not None else "selected",
                NORMALIZE=share_T is not None,
                num_warps=warps,
            )
        return grad_gate_TF, grad_up_TF, grad_scale_T, None, None


def _rebuild(
    packed_gate: Tensor,
    packed_up: Tensor,
    scale_T: Tensor | None,
    bits: Tensor,
    neurons: int,
    fused: FusedActivation,
) -> Tensor:
    """Returns the hidden values of a packed call, as its forward pass computed them."""
    rows, width = packed_gate.shape
    hidden_TF = packed_gate.new_empty(rows, neurons)
    if rows:
        block, warps = launch_shape(neurons)
        rebuild_kernel[(rows,)](
            packed_gate,
            packed_up,
            scale_T,
            bits,
            hidden_TF,
            width,
            NEURONS=neurons,
            BLOCK=block,
            ACTIVATION=fused.value,
            num_warps=warps,
        )
    return hidden_TF


def _score(keep: Tensor | TopK | None, *, given: bool) -> triton.JITFunction | None:
    """Returns the device function that ranks; None where nothing does, or torch has."""
    return fused_score(keep.score) if isinstance(keep, TopK) and not given else None


class _Slots:
    """Holds the balance sums that each program of the forward kernel leaves, and adds them up."""

    def __init__(self, gate_TF: Tensor, sums: WeightSums) -> None:
        rows, neurons = gate_TF.shape
        self.neurons, self.segments = neurons, sums.segments
        segment_T, self.order_T = sums.segment_T, None
        if not sums.in_order:
            segment_T, order_T = segment_T.sort(stable=True)
            self.order_T = order_T
        numbers = torch.arange(sums.segments + 1, device=segment_T.device)
        self.starts = torch.searchsorted(segment_T, numbers.to(segment_T.dtype))
        self.segment_T = segment_T
        usual = rows if _expected_rows is None else _expected_rows
        each = triton.next_power_of_2(triton.cdiv(max(1, usual), _SUMMING_PROGRAMS))
        self.rows_each = min(_MOST_ROWS, each)
        count = triton.cdiv(rows, self.rows_each) + sums.segments
        self.weights = gate_TF.new_empty(count, neurons, dtype=torch.float32)
        self.counts = gate_TF.new_empty(count, neurons, dtype=torch.int32)

    def add_up(self) -> tuple[Tensor, Tensor]:
        """Returns fp32 ``[S, F]`` each: sums of weights, counts of rows."""
        weight_sum_SF, kept_SF = self.weights.new_empty(2, self.segments, self.neurons)
        block = min(128, triton.next_power_of_2(self.neurons))
        segment_sums[(self.segments, triton.cdiv(self.neurons, block))](
            self.starts,
            self.weights,
            self.counts,
            weight_sum_SF,
            kept_SF,
            self.neurons,
            ROWS=self.rows_each,
            SLOTS=16,
            BLOCK=block,
            num_warps=4,
        )
        return weight_sum_SF, kept_SF


def fused_glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    scale_T: Tensor | None,
    keep: Tensor | TopK | None,
    *,
    activate: Activate,
    packed: Packed | None,
    sums: WeightSums | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns hidden values, and with ``sums`` the sums of weights and the counts.

    See :func:`mone_megatron.kernels.ops.selected_glu_and_sums`.
    """
    if isinstance(keep, TopK) and keep.k >= gate_TF.shape[-1]:
        keep = None
    settings = _Settings(activate, keep, sums)
    outputs: tuple[Tensor, Tensor | None, Tensor | None] = _FusedGLU.apply(
        gate_TF, up_TF, scale_T, settings, packed
    )
    return outputs
