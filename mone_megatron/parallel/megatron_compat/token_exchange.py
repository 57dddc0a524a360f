"""Exchanges tokens between ranks: their split sizes, uneven parts over gloo, rows of any number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _to_cpu_always(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``maybe_move_tensor_to_cpu`` for the CPU: it converts whatever it is asked to.

    The original converts only what was on a GPU; the split sizes that all-to-all needs must become
    numpy on CPU, too.
    """

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return tensor

    return maybe_move_tensor_to_cpu


def _gather_uneven(part: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Returns all ranks' rows in rank order, padded on the way: gloo gathers equal parts only."""
    largest = max(sizes)
    padded = part.new_zeros(largest, *part.shape[1:])
    padded[: part.shape[0]] = part
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_uneven(
    whole: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]
) -> torch.Tensor:
    """Returns this rank's rows of the sum; gloo's reduce_scatter takes equal parts only."""
    summed = whole.clone()
    dist.all_reduce(summed, group=group)
    return summed.split(sizes)[group.rank()].clone()


def _with_uneven_splits(even: Callable[..., Any], uneven: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``even``, with ``uneven`` in its place where ranks hold different numbers of rows.

    ``even`` is ``mappings._gather_along_first_dim`` or its counterpart. With expert tensor
    parallelism ranks hold different numbers of tokens, which gloo's collectives refuse.
    """

    @functools.wraps(even)
    def along_first_dim(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if split_sizes is None or group.size() == 1:
            return even(tensor, group, split_sizes, use_global_buffer)
        return uneven(tensor, group, [int(size) for size in split_sizes])

    return along_first_dim


def exchange_over_gloo() -> None:
    """Lets megatron-core's dispatchers and mappings exchange tokens on CPU."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    move = _to_cpu_always(moe_utils.maybe_move_tensor_to_cpu)
    moe_utils.maybe_move_tensor_to_cpu = move
    token_dispatcher.maybe_move_tensor_to_cpu = move
    mappings._gather_along_first_dim = _with_uneven_splits(
        mappings._gather_along_first_dim, _gather_uneven
    )
    mappings._reduce_scatter_along_first_dim = _with_uneven_splits(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_uneven
    )


def count_rows_sent(dispatcher: Any) -> None:
    """Has an alltoall dispatcher count the rows that it sends, of a router that varies them.

    It takes them for ``moe_router_topk`` a token: 0.19 then leaves rows out, or sends some of no
    token's choice. Counting waits for a GPU.
    """
    preprocess = dispatcher.preprocess

    def counting(routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert: torch.Tensor = preprocess(routing_map)
        dispatcher.num_out_tokens = int(routing_map.sum())
        return tokens_per_expert

    dispatcher.preprocess = counting
