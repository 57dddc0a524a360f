"""Sorts tokens by their experts where one rank has all of a layer's experts: once, in one copy.

megatron-core's dispatchers prepare an exchange between ranks, exchange, and sort what came by
expert. Where no rank has anything to exchange, each of these steps copies all rows, forward and
backward. The rows are the same here, in the same order, and so is every sum.

Shape suffixes: N tokens, A all experts, T rows (a token once per chosen expert), H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import address, compiled, threads
from mone_megatron.kernels.experts_cpu import Rows


def can_dispatch_locally(config: TransformerConfig, dispatcher: MoETokenDispatcher) -> bool:
    """Returns whether :class:`LocalTokenDispatcher` does what ``dispatcher`` would do.

    On CPU only: on a GPU megatron-core's fused kernels and CUDA graphs know its own dispatchers.
    """
    return bool(
        config.use_cpu_initialization
        and config.moe_token_dispatcher_type in ("alltoall", "allgather")
        and dispatcher.ep_size == 1
        and dispatcher.tp_size == 1
        and config.moe_expert_capacity_factor is None
        and not config.moe_router_padding_for_quantization
        and not config.moe_permute_fusion
        and not config.moe_shared_expert_overlap
    )


class LocalTokenDispatcher(MoETokenDispatcher):
    """Is a token dispatcher of one rank, which exchanges nothing."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        """Takes what megatron-core's dispatchers take, but which experts are here: all are."""
        super().__init__(config, pg_collection)
        self._order: _Order | None = None
        self._combined = False
        self.hidden_shape = torch.Size()

    @property
    def token_of_row_T(self) -> Tensor:
        """Returns the token of each row, int64 ``[T]``, until the rows are combined."""
        assert self._order is not None, "asked after dispatch_preprocess"
        return self._order.token_T

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Says where each row comes from.

        Args:
            hidden_states: ``[s, b, H]``.
            routing_map: bool ``[N, A]``, the chosen experts.
            probs: ``[N, A]``, the weight of each chosen one.

        Returns:
            The tokens as ``[N, H]``, and ``probs``.
        """
        self.hidden_shape = hidden_states.shape
        self._order = _Order(routing_map)
        return hidden_states.view(-1, hidden_states.shape[-1]), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both as they are: there is nobody to send them to."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rows ``[T, H]`` by expert, int64 ``[A]`` how many each has, and weights."""
        order = self._order
        assert order is not None, "asked after dispatch_preprocess"
        rows_TH: Tensor = _Rows.apply(hidden_states, order)
        return rows_TH, order.rows_A, probs.reshape(-1).index_select(0, order.chosen_T)

    def rows(self) -> Rows:
        """Returns where the rows come from, for who copies them without this dispatcher."""
        assert self._order is not None, "asked after dispatch_preprocess"
        return Rows(self._order.rows_A, self._order.token_T, self._order.chosen_T)

    def combined(self) -> None:
        """Is told that tokens' sums will come, not the experts' outputs."""
        self._order, self._combined = None, True

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Returns the experts' outputs as they are."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Returns the experts' outputs as they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Returns each token's sum over its experts' outputs, ``[s, b, H]``."""
        if self._combined:
            self._combined = False
            return hidden_states.view(self.hidden_shape)
        order, self._order = self._order, None
        assert order is not None, "asked once after each dispatch"
        tokens_NH: Tensor = _Sums.apply(hidden_states, order)
        return tokens_NH.view(self.hidden_shape)


class _Order:
    """Says where each row of a microbatch comes from, and where each token's rows are."""

    def __init__(self, map_NA: Tensor) -> None:
        """Sorts the rows: expert after expert, and the tokens of each in their order.

        Of each row there are then its token and its place in the map; of each token, the rows in
        the order of their experts, and where they begin.
        """
        tokens, experts = map_NA.shape
        self.library = library = compiled().library
        if library is None:
            place_T = map_NA.T.contiguous().view(-1).nonzero().view(-1)
            self.token_T = place_T % tokens
            self.chosen_T = self.token_T * experts + place_T // tokens
            self.rows_A = map_NA.sum(dim=0)
            self.row_T = self.token_T.argsort(stable=True)
            rows_N = map_NA.sum(dim=1)
            self.first_N = rows_N.cumsum(0) - rows_N
            return
        map_NA = map_NA.contiguous()
        self.rows_A, next_A = torch.empty(2, experts, dtype=torch.int64).unbind()
        self.first_N = torch.empty(tokens, dtype=torch.int64)
        sizes = tokens, experts, address(map_NA)
        rows: int = library.count_rows(*sizes, address(self.rows_A), address(self.first_N))
        self.token_T, self.chosen_T, self.row_T = torch.empty(3, rows, dtype=torch.int64).unbind()
        library.order_rows(
            *sizes, address(self.rows_A), address(next_A), address(self.token_T),
            address(self.chosen_T), address(self.row_T),
        )  # fmt: skip

    def rows(self, tokens_NH: Tensor) -> Tensor:
        if self.library is None or tokens_NH.dtype is not torch.float32:
            return tokens_NH.index_select(0, self.token_T)
        tokens_NH = tokens_NH.contiguous()
        rows_TH = torch.empty(len(self.token_T), tokens_NH.shape[1])
        self.library.copy_rows(
            *rows_TH.shape, address(self.token_T), address(tokens_NH), address(rows_TH), threads()
        )
        return rows_TH

    def sums(self, rows_TH: Tensor) -> Tensor:
        """Returns the sum of each token's rows, added in the order of their experts."""
        if self.library is None or rows_TH.dtype is not torch.float32:
            return F.embedding_bag(self.row_T, rows_TH, self.first_N, mode="sum")
        rows_TH = rows_TH.contiguous()
        sums_NH = torch.empty(len(self.first_N), rows_TH.shape[1])
        self.library.add_rows(
            len(sums_NH), *rows_TH.shape, address(self.row_T), address(self.first_N),
            address(rows_TH), address(sums_NH), threads(),
        )  # fmt: skip
        return sums_NH


class _Rows(torch.autograd.Function):
    """Copies each token to its rows."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, tokens_NH: Tensor, order: _Order
    ) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return order.rows(tokens_NH)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_TH: Tensor) -> tuple[Tensor, None]:
        return ctx.order.sums(grad_TH), None  # type: ignore[attr-defined]


class _Sums(torch.autograd.Function):
    """Adds each token's rows up: the other way round."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows_TH: Tensor, order: _Order) -> Tensor:
        ctx.order = order  # type: ignore[attr-defined]
        return order.sums(rows_TH)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NH: Tensor) -> tuple[Tensor, None]:
        return ctx.order.rows(grad_NH), None  # type: ignore[attr-defined]
