"""Keeps how many rows each expert gets, and from whom, as megatron-core's dispatcher counted.

The dispatchers count rows on the device, and copy what they need to the host. What they counted is
kept here on the device, so that reading it makes nobody wait, and nothing is gathered again.

Shape suffixes: N tokens of this rank, A all experts, E experts on this rank, R ranks that send
tokens here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

from mone_megatron.mone.chunk_unions import TokenOrder
from mone_megatron.mone.local_dispatch import LocalTokenDispatcher


class RowCounts:
    """Keeps the numbers of one dispatcher. Each microbatch's replace those before."""

    def __init__(self, dispatcher: MoETokenDispatcher) -> None:
        """Listens to ``dispatcher``; one that is neither alltoall nor allgather keeps nothing."""
        self.dispatcher = dispatcher
        self._rows_E: Tensor | None = None
        self._by_source_RE: Tensor | None = None
        if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
            self._count = dispatcher.preprocess
            dispatcher.preprocess = self._preprocess

    def of_experts(self, counted_E: Tensor, device: torch.device) -> Tensor:
        """Returns the rows of each expert of this rank, int64 ``[E]`` on ``device``.

        Args:
            counted_E: the dispatcher's counts, on any device.
            device: the device on which the counts are wanted.
        """
        if isinstance(self.dispatcher, MoEAllGatherTokenDispatcher):
            return self.by_source().sum(dim=0)
        rows_E, self._rows_E = self._rows_E, None
        # The flex dispatcher, and the one of a single rank, have them on the device.
        return counted_E.to(device) if rows_E is None else rows_E

    def by_source(self) -> Tensor:
        """Returns the rows that each expert gets from each source, int64 ``[R, E]``.

        Sources are in the order in which their rows lie within an expert.
        """
        if isinstance(self.dispatcher, MoEAllGatherTokenDispatcher):
            # Every source has as many tokens, each a row of the map of all of them.
            map_NE = self.dispatcher.local_map
            sources = dist.get_world_size(self.dispatcher.tp_ep_group)
            by_source_RE: Tensor = map_NE.view(sources, -1, map_NE.shape[-1]).sum(dim=1)
            return by_source_RE
        kept_RE, self._by_source_RE = self._by_source_RE, None
        assert kept_RE is not None, "asked once after each dispatch"
        return kept_RE

    def tokens_of_rows(self, rows: int) -> Tensor:
        """Returns the token of each row of this rank's experts, int64 ``[T]``.

        All experts are on this rank, and so are all neurons of them (``config.validate``).

        Args:
            rows: T, how many rows there are.
        """
        if isinstance(self.dispatcher, LocalTokenDispatcher):
            return self.dispatcher.token_of_row_T
        if isinstance(self.dispatcher, MoEAllGatherTokenDispatcher):
            map_NA = self.dispatcher.local_map
        else:
            map_NA = self.dispatcher.routing_map
        assert dist.get_world_size(self.dispatcher.tp_ep_group) == 1, "checked by config.validate"
        # Rows lie by expert, then by token. Those that are there come first, and nobody waits to
        # count them.
        absent_L = ~map_NA.T.flatten()
        return absent_L.to(torch.uint8).argsort(stable=True)[:rows] % len(map_NA)

    def order_of_rows(self, rows: int) -> TokenOrder | None:
        """Returns where the tokens of this rank's rows stand; None where that is not known here.

        It is known where one rank has all experts of a layer and no token lacks a row or has an
        empty one.

        Args:
            rows: T, how many rows there are.
        """
        dispatcher = self.dispatcher
        known = (LocalTokenDispatcher, MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher)
        config = dispatcher.config
        if (
            not isinstance(dispatcher, known)
            or dispatcher.ep_size > 1
            or dispatcher.tp_size > 1
            or config.context_parallel_size > 1
            or config.moe_expert_capacity_factor is not None
            or config.moe_router_padding_for_quantization
        ):
            return None
        shape = dispatcher.hidden_shape
        return TokenOrder(self.tokens_of_rows(rows), shape[:-1].numel(), shape[1])

    def _preprocess(self, routing_map_NA: Tensor) -> Tensor:
        """Counts as the dispatcher does, and keeps the numbers before they go to the host."""
        dispatcher = self.dispatcher
        rows_E: Tensor = self._count(routing_map_NA)
        self._rows_E = rows_E
        if dispatcher.num_local_experts > 1:
            self._by_source_RE = dispatcher.num_global_tokens_per_local_expert
        elif dispatcher.tp_size == 1 and dispatcher.ep_size > 1:
            self._by_source_RE = dispatcher.output_splits.unsqueeze(-1)
        elif dispatcher.ep_size == 1 and dispatcher.tp_size > 1:
            self._by_source_RE = dispatcher.output_splits_tp.unsqueeze(-1)
        elif dispatcher.tp_size == 1:
            self._by_source_RE = rows_E.unsqueeze(0)
        else:
            # With one expert on each rank of both groups the dispatcher keeps sums only.
            self._by_source_RE = self._gathered(routing_map_NA)
        return rows_E

    def _gathered(self, routing_map_NA: Tensor) -> Tensor:
        rows_A = routing_map_NA.sum(dim=0)
        group = self.dispatcher.tp_ep_group
        gathered = [torch.empty_like(rows_A) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, rows_A, group=group)
        indices = self.dispatcher.local_expert_indices
        by_rank_RE = torch.stack(gathered)[:, indices[0] : indices[-1] + 1]
        # The group counts expert-parallel ranks first; rows lie by tensor-parallel ranks first.
        by_place = by_rank_RE.view(-1, self.dispatcher.tp_size, by_rank_RE.shape[-1])
        return by_place.transpose(0, 1).flatten(0, 1)
