"""Saves only kept gate and up values and the mask as bits: the memory mode, in plain torch.

The backward pass spreads them out again, zeros elsewhere, and runs the operation once more: the
other entries are multiplied by zero anyway, so its gradients are those of the full mode. A NaN at a
neuron that is not kept reaches the output, and comes back through the gradient of that only.

Shape suffixes: T tokens (rows), F neurons of one expert on this rank, S segments of rows, B bytes
of a row's bits, V kept values of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mone_megatron.kernels.reference import Packed, WeightSums

Outputs = tuple[Tensor, Tensor | None, Tensor | None]
# (gate, up, scale, mask, sums) to hidden values, sums of weights and counts.
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor, WeightSums | None], Outputs]


def pack_bits(mask_TF: Tensor) -> Tensor:
    """Returns uint8 ``[T, ceil(F/8)]``: 8 neurons a byte, the first in the lowest bit."""
    if mask_TF.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask_TF.numpy(), axis=-1, bitorder="little"))
    padded = torch.nn.functional.pad(mask_TF, (0, -mask_TF.shape[-1] % 8))
    weights_8 = 2 ** torch.arange(8, device=mask_TF.device)
    return (padded.unflatten(-1, (-1, 8)) * weights_8).sum(dim=-1).to(torch.uint8)


def unpack_bits(bits_TB: Tensor, neurons: int) -> Tensor:
    """Returns the bool mask ``[T, neurons]`` that :func:`pack_bits` packed."""
    if bits_TB.device.type == "cpu":
        mask = np.unpackbits(bits_TB.numpy(), axis=-1, count=neurons, bitorder="little")
        return torch.from_numpy(mask).view(torch.bool)
    shifts_8 = torch.arange(8, device=bits_TB.device)
    mask_TF = (bits_TB.unsqueeze(-1) >> shifts_8) & 1
    return mask_TF.flatten(-2)[:, :neurons].bool()


def _spread(values_V: Tensor, mask_TF: Tensor) -> Tensor:
    """Returns ``values_V`` in row order where the mask is True, and zero elsewhere."""
    return values_V.new_zeros(mask_TF.shape).masked_scatter_(mask_TF, values_V)


@contextmanager
def rebuilt_when_needed(hidden_TF: Tensor, packed: Packed) -> Iterator[None]:
    """Lets operations in the block that save ``hidden_TF`` save how to rebuild it instead."""
    rebuild = packed.rebuild

    def forget(tensor: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size]:
        same = tensor.data_ptr() == hidden_TF.data_ptr() and tensor.numel() == hidden_TF.numel()
        if rebuild is None or not same or not tensor.is_contiguous():
            return tensor
        return rebuild, tensor.shape

    def recall(saved: Tensor | tuple[Callable[[], Tensor], torch.Size]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again, shape = saved
        return again().view(shape)

    with torch.autograd.graph.saved_tensors_hooks(forget, recall):
        yield


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate_TF: Tensor,
        up_TF: Tensor,
        scale_T: Tensor | None,
        mask_TF: Tensor,
        run: Run,
        sums: WeightSums | None,
        packed: Packed,
    ) -> Outputs:
        hidden_TF, weight_sum_SF, kept_SF = run(gate_TF, up_TF, scale_T, mask_TF, sums)
        gate_V, up_V = gate_TF.masked_select(mask_TF), up_TF.masked_select(mask_TF)
        bits_TB, neurons = pack_bits(mask_TF), gate_TF.shape[-1]
        ctx.save_for_backward(gate_V, up_V, scale_T, bits_TB)  # type: ignore[arg-type]

        def rebuild() -> Tensor:
            mask_TF = unpack_bits(bits_TB, neurons)
            gate_TF, up_TF = _spread(gate_V, mask_TF), _spread(up_V, mask_TF)
            with torch.no_grad():
                return run(gate_TF, up_TF, scale_T, mask_TF, None)[0]

        packed.rebuild = rebuild
        ctx.set_materialize_grads(False)
        ctx.run, ctx.neurons, ctx.sums = run, neurons, sums  # type: ignore[attr-defined]
        if kept_SF is not None:
            ctx.mark_non_differentiable(kept_SF)
        return hidden_TF, weight_sum_SF, kept_SF

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_hidden_TF: Tensor | None,
        grad_sum_SF: Tensor | None,
        _: None,
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None, None, None]:
        gate_V, up_V, scale_T, bits_TB = ctx.saved_tensors  # type: ignore[attr-defined]
        mask_TF = unpack_bits(bits_TB, ctx.neurons)  # type: ignore[attr-defined]
        gate_TF = _spread(gate_V, mask_TF).requires_grad_()
        up_TF = _spread(up_V, mask_TF).requires_grad_()
        leaves = [gate_TF, up_TF]
        if scale_T is not None:
            scale_T = scale_T.detach().requires_grad_()
            leaves.append(scale_T)
        with torch.enable_grad():
            hidden_TF, weight_sum_SF, _kept = ctx.run(  # type: ignore[attr-defined]
                gate_TF,
                up_TF,
                scale_T,
                mask_TF,
                ctx.sums,  # type: ignore[attr-defined]
            )
        outputs, grads = [], []
        for output, grad in ((hidden_TF, grad_hidden_TF), (weight_sum_SF, grad_sum_SF)):
            if grad is not None:
                outputs.append(output)
                grads.append(grad)
        gradients = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
        grad_scale_T = gradients[2] if scale_T is not None else None
        return gradients[0], gradients[1], grad_scale_T, None, None, None, None


def packed_glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    scale_T: Tensor | None,
    mask_TF: Tensor,
    run: Run,
    sums: WeightSums | None,
    packed: Packed,
) -> Outputs:
    """Returns ``run(gate, up, scale, mask, sums)``, saving only what the kept neurons need."""
    outputs: Outputs = _Packed.apply(gate_TF, up_TF, scale_T, mask_TF, run, sums, packed)
    return outputs
