"""Runs the Triton kernels of :mod:`.triton_decode`, one after the other: see :mod:`.decode`.

Imported only where Triton is. Tensors are on CUDA, or on CPU under Triton's interpreter, which the
tests use. On a GPU: not run here.

Shape suffixes: N tokens, K experts of a token, S slots, E experts, F neurons of one expert, H
hidden size, P parts of the kept neurons.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from mone_megatron.kernels.fused import (
    fused_activation,
    fused_score,
    given_scores,
    selecting_shape,
    supports,
)
from mone_megatron.kernels.reference import Activate, TopK
from mone_megatron.kernels.triton_decode import (
    choose_kernel,
    down_kernel,
    project_kernel,
    up_kernel,
)
from mone_megatron.methods.scores import SCORES

# Rows and lanes of a program that multiplies rows by a token: 16 bytes a thread and row in bf16.
DOT_ROWS, DOT_BLOCK, DOT_WARPS = 4, 512, 2
# Rows and lanes of one that adds rows up, and in how many parts a slot's rows are added.
SUM_ROWS, SUM_BLOCK, SUM_WARPS = 16, 128, 4
PARTS = 2

__all__ = ["sparse_experts", "supports"]


def sparse_experts(
    tokens_NH: Tensor,
    experts_NK: Tensor,
    probs_NK: Tensor,
    gate_EFH: Tensor,
    up_EFH: Tensor,
    down_EFH: Tensor,
    keep: TopK,
    activate: Activate,
) -> Tensor:
    """Computes :func:`mone_megatron.kernels.decode.sparse_experts`, which has done the checks."""
    tokens_NH = tokens_NH.contiguous()
    hidden, neurons = tokens_NH.shape[-1], gate_EFH.shape[1]
    expert_S, order_S = experts_NK.flatten().sort(stable=True)
    token_S = order_S // experts_NK.shape[-1]
    slots, kept = len(expert_S), min(keep.k, neurons)
    new = tokens_NH.new_empty

    def project(weight_EFH: Tensor) -> Tensor:
        values_SF = new(slots, neurons)
        project_kernel[(slots, triton.cdiv(neurons, DOT_ROWS))](
            tokens_NH,
            weight_EFH,
            token_S,
            expert_S,
            values_SF,
            hidden,
            neurons,
            weight_EFH.stride(0),
            weight_EFH.stride(1),
            ROWS=DOT_ROWS,
            BLOCK=DOT_BLOCK,
            num_warps=DOT_WARPS,
        )
        return values_SF

    gate_SF = project(gate_EFH)
    fused, score = fused_activation(activate), SCORES[keep.score]
    assert fused is not None, "asked of supports()"
    up_SF = project(up_EFH) if score.reads_up else None
    scores_SF = given_scores(gate_SF, gate_SF if up_SF is None else up_SF, keep.score, activate)
    chosen_SK = new(slots, kept, dtype=torch.int32)
    weight_SK = new(slots, kept, dtype=torch.float32)
    block, warps = selecting_shape(neurons, gate_SF.dtype)
    choose_kernel[(slots,)](
        gate_SF,
        up_SF,
        scores_SF,
        probs_NK.flatten()[order_S],
        chosen_SK,
        weight_SK,
        kept,
        NEURONS=neurons,
        BLOCK=block,
        ACTIVATION=fused.value,
        SCORE=fused_score(keep.score) if scores_SF is None else None,
        SIGNED=score.signed,
        NARROW=(gate_SF if scores_SF is None else scores_SF).dtype is torch.bfloat16,
        num_warps=warps,
    )
    if up_SF is None:
        up_kernel[(slots, triton.cdiv(kept, DOT_ROWS))](
            tokens_NH,
            up_EFH,
            token_S,
            expert_S,
            chosen_SK,
            weight_SK,
            hidden,
            kept,
            up_EFH.stride(0),
            up_EFH.stride(1),
            ROWS=DOT_ROWS,
            BLOCK=DOT_BLOCK,
            num_warps=DOT_WARPS,
        )
    output_SPH = new(slots, PARTS, hidden, dtype=torch.float32)
    down_kernel[(slots, triton.cdiv(hidden, SUM_BLOCK), PARTS)](
        down_EFH,
        expert_S,
        order_S,
        chosen_SK,
        weight_SK,
        output_SPH,
        hidden,
        kept,
        down_EFH.stride(0),
        down_EFH.stride(1),
        PARTS=PARTS,
        ROWS=SUM_ROWS,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
    )
    return output_SPH.view(len(tokens_NH), -1, hidden).sum(dim=1).to(tokens_NH.dtype)
