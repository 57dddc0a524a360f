"""Leaves out collectives within a group of one rank, on CPU.

Such a rank has nobody to exchange with, but gloo copies what it is given into fresh memory and back
all the same: all gradients and all parameters in every step of the distributed optimizer.

``tests/parallel/test_groups_of_one.py`` fails when torch no longer needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class _Done:
    """Has the interface of a collective's handle, of which the work is done."""

    def wait(self, timeout: object = None) -> bool:
        """Returns at once that it went well."""
        return True

    def is_completed(self) -> bool:
        """Returns that it is done."""
        return True


def _done(async_op: bool) -> _Done | None:
    return _Done() if async_op else None


def _copied(output: Tensor, given: Tensor, async_op: bool) -> _Done | None:
    if output.data_ptr() != given.data_ptr():
        output.copy_(given.view_as(output))
    return _done(async_op)


def _all_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(
        tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        if dist.get_world_size(group) != 1:
            return original(tensor, op, group, async_op)
        return _done(async_op)

    return all_reduce


def _all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather_into_tensor(
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        if dist.get_world_size(group) != 1:
            return original(output_tensor, input_tensor, group, async_op)
        return _copied(output_tensor, input_tensor, async_op)

    return all_gather_into_tensor


def _reduce_scatter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter_tensor(
        output: Tensor,
        input: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        if dist.get_world_size(group) != 1:
            return original(output, input, op, group, async_op)
        return _copied(output, input, async_op)

    return reduce_scatter_tensor


# What a step calls, by its name in torch.distributed.
_COLLECTIVES: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
}


def leave_out_collectives_of_one() -> None:
    """Has torch.distributed do nothing, or one copy, where a group has one rank.

    To be called once, before anything binds the functions by their names.
    """
    for name, without in _COLLECTIVES.items():
        setattr(dist, name, without(getattr(dist, name)))
