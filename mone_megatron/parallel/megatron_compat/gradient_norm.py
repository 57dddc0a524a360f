"""Measures and clips gradients: in short rows on CPU, by fused kernels on CUDA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

# Elements of a gradient whose squares are added up in fp32.
_ROW = 4096
# Sums of squares from which on what fp32 takes for zero does not count.
_LEAST = 1e-20


def _l2_norm(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], *args: object
) -> tuple[torch.Tensor, None]:
    """Computes ``local_multi_tensor_l2_norm`` on CPU: the norm of all tensors, ``[1]`` fp32.

    The library's returns it on CUDA, and adds up squares in fp32 over whole gradient buffers,
    whose rounding alone (1e-5 relative) hides what layouts could differ by.
    """
    squares = sum(_sum_of_squares(tensor) for tensors in tensor_lists for tensor in tensors)
    return torch.tensor([squares], dtype=torch.float64).sqrt().float(), None


def _sum_of_squares(tensor: torch.Tensor) -> float:
    """Returns the sum of squares, equal to 1e-6 relative or better.

    Squares are added up in fp32 within rows, whose rounding mostly averages out (1e-7; less so of
    bf16 values), and rows in fp64. Where squares are too large or too small for fp32, all is in
    fp64.
    """
    flat = tensor.detach().reshape(-1)
    whole = len(flat) // _ROW * _ROW
    # Of itself the norm of bf16 rows would be rounded to bf16.
    wide = torch.promote_types(flat.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=-1, dtype=wide).double()
    rest = flat[whole:].double()
    total = float(torch.dot(rows, rows)) + float(torch.dot(rest, rest))
    if _LEAST < total < math.inf:
        return total
    return sum(float(torch.dot(part, part)) for part in map(torch.Tensor.double, flat.split(_ROW)))


def _fused_l2_norm(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], *args: object
) -> tuple[torch.Tensor, None]:
    """Computes ``local_multi_tensor_l2_norm`` without waiting: the norm of all, ``[1]`` fp32."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    return torch.nn.utils.get_total_norm(tensors).float().view(1), None


def _fused_scale(
    chunk_size: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Does ``local_multi_tensor_scale`` at once, and in place where source and target are one."""
    sources, targets = tensor_lists
    for source, target in zip(sources, targets, strict=True):
        if source is not target:
            target.copy_(source)
    torch._foreach_mul_(targets, scale)


def measure_gradients_on_cpu() -> None:
    """Lets gradients be measured in fp64 and clipped in place, on CPU."""
    from megatron.core.optimizer import clip_grads

    clip_grads.l2_norm_impl = _l2_norm
    # The library's makes a scaled copy and copies it back.
    clip_grads.multi_tensor_scale_impl = _fused_scale


def fuse_gradient_norm() -> None:
    """Lets fused kernels measure and clip gradients, on CUDA.

    Without Transformer Engine or apex megatron-core takes the norm of one gradient after another to
    the host, which waits for each, and clips each by a product and a copy.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _fused_l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _fused_scale


def norms_apart(
    optimizer: MegatronOptimizer, transformer: TransformerConfig
) -> Mapping[str | None, float]:
    """Returns the norms of the gradients that megatron-core clips apart from all others, by name.

    0.19 leaves out of ``get_grad_norm`` the parameters of multi-token prediction whose gradients
    go no further (``mtp_detach_heads``), and clips them by a norm of their own. Collective, where
    there are any; otherwise no rank has to be asked, which the host would wait for.
    """
    if not getattr(transformer, "mtp_detach_heads", False):
        return {}
    return dict(optimizer._compute_grad_norms_by_group())


def clipped_together(parameters: list[torch.Tensor]) -> Mapping[str | None, list[torch.Tensor]]:
    """Returns parameters by the name of the norm of :func:`norms_apart` that they are clipped by.

    Those that are clipped by the norm of all others stand under None.
    """
    groups: dict[str | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "grad_norm_group", None), []).append(parameter)
    return groups
