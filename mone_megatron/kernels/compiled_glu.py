"""Computes SwiGLU at the selected neurons by compiled functions, a few passes over each row.

They are those of ``compiled_cpu.c``. Masks are those of :mod:`.reference`, bit for bit; values and
gradients are equal up to rounding.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, threads, with_rows
from mone_megatron.kernels.reference import WeightSums

# Elements that torch and the functions work on in turn: few enough for a core's cache.
_BLOCK_ELEMENTS = 131072


class CompiledSwiGLU(torch.autograd.Function):
    """Computes SwiGLU at the selected neurons, and with ``sums`` the sums of their weights.

    The neurons are a mask's, or the ``k`` with the largest |a|; with neither all are. Unselected
    entries are multiplied by zero, so that NaN spreads.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        library: Any,
        gate_TF: Tensor,
        up_TF: Tensor,
        mask_TF: Tensor | None,
        k: int | None,
        scale_T: Tensor | None,
        sums: WeightSums | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns hidden values, and with ``sums`` sums of weights and counts (see :mod:`.ops`)."""
        rows, neurons = gate_TF.shape
        gate_TF, up_TF = with_rows(gate_TF), with_rows(up_TF)
        scale_T = None if scale_T is None else scale_T.contiguous()
        if k is not None:
            mask_TF = torch.empty(rows, neurons, dtype=torch.bool)
        elif mask_TF is not None:
            mask_TF = mask_TF.contiguous()
        hidden_TF, activation_TF = torch.empty(rows, neurons), torch.empty(rows, neurons)
        weight_sum_SF = kept_SF = inverse_T = segment_T = None
        if sums is not None:
            assert mask_TF is not None, "sums are asked for where neurons are left out"
            weight_sum_SF, kept_SF = torch.zeros(2, sums.segments, neurons).unbind()
            inverse_T = torch.empty(rows) if sums.normalize else None
            segment_T = sums.segment_T.contiguous()
        count = threads()
        step = max(1, _BLOCK_ELEMENTS * count // neurons)
        for first in range(0, rows, step):
            block = slice(first, min(first + step, rows))
            activation_BF = activation_TF[block]
            torch.ops.aten.silu.out(gate_TF[block], out=activation_BF)
            mask_BF, inverse_B, segment_B, scale_B = (
                None if one is None else one[block]
                for one in (mask_TF, inverse_T, segment_T, scale_T)
            )
            library.glu_forward(
                len(activation_BF), neurons, k or 0, address(up_TF[block]), up_TF.stride(0),
                address(activation_BF), address(scale_B), address(mask_BF),
                address(hidden_TF[block]), address(inverse_B), count,
            )  # fmt: skip
            if sums is not None:
                library.glu_sums(
                    len(activation_BF), neurons, address(activation_BF), address(mask_BF),
                    address(inverse_B), address(segment_B), address(kept_SF),
                    address(weight_sum_SF), count,
                )  # fmt: skip
        if kept_SF is not None:
            ctx.mark_non_differentiable(kept_SF)
        if any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            ctx.save_for_backward(
                gate_TF, up_TF, activation_TF, mask_TF, scale_T, inverse_T, segment_T  # type: ignore[arg-type]
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.library = library  # type: ignore[attr-defined]
        return hidden_TF, weight_sum_SF, kept_SF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_hidden_TF: Tensor | None,
        grad_sum_SF: Tensor | None,
        _: None,
    ) -> tuple[None, Tensor, Tensor, None, None, Tensor | None, None]:
        """Returns the gradients of gate, up and scale; the first two are halves of one matrix."""
        gate_TF, up_TF, activation_TF, mask_TF, scale_T, inverse_T, segment_T = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, neurons = gate_TF.shape
        if grad_hidden_TF is None:
            grad_hidden_TF = torch.zeros(rows, neurons)
        grad_hidden_TF = with_rows(grad_hidden_TF)
        grad_sum_SF = None if grad_sum_SF is None else grad_sum_SF.contiguous()
        grad_gate_TF, grad_up_TF = torch.empty(rows, 2 * neurons).chunk(2, dim=-1)
        grad_scale_T = torch.empty(rows) if scale_T is not None else None
        ctx.library.glu_backward(  # type: ignore[attr-defined]
            rows, neurons, address(gate_TF), gate_TF.stride(0), address(up_TF), up_TF.stride(0),
            address(activation_TF), address(mask_TF), address(scale_T), address(grad_hidden_TF),
            grad_hidden_TF.stride(0), address(grad_sum_SF), address(segment_T),
            address(inverse_T), address(grad_gate_TF), address(grad_up_TF),
            grad_gate_TF.stride(0), address(grad_scale_T), None, threads(),
        )  # fmt: skip
        return None, grad_gate_TF, grad_up_TF, None, None, grad_scale_T, None
