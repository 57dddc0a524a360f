"""Defines MoNELayer, megatron-core's MoE layer with neuron selection inside its experts.

Routing, dispatch and combination are megatron-core's. This subclass tells the experts which rows
came from which microbatch, so that the neuron balance loss means the same in every layout: with
expert parallelism an expert sees tokens of several data-parallel ranks, hence of several
microbatches, at once; with tensor parallelism and unsharded experts it sees a part of one.

The numbers of rows that a layer needs are those that megatron-core's dispatcher counts, kept on the
device (:mod:`.row_counts`): no layer of ours makes the host wait for a GPU.

Shape suffixes: E experts on this rank, R ranks that send tokens here, T rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.local_dispatch import LocalTokenDispatcher, can_dispatch_locally
from mone_megatron.mone.mlp import NeuronSharedExpert
from mone_megatron.mone.neurons import Segments
from mone_megatron.mone.row_counts import RowCounts


@dataclass(frozen=True)
class MicrobatchSources:
    """Says which microbatches the tokens that reach this rank's experts come from.

    Attributes:
        microbatch_of_source: for each rank that sends tokens here, in the order of the
            expert-and-tensor-parallel group, the (local) number of its microbatch.
        shared_group: the ranks that hold the same experts for other tokens of the same
            microbatch, or None when this rank sees whole microbatches.
        together: whether the tokens of all those microbatches are balanced as one.
    """

    microbatch_of_source: tuple[int, ...]
    shared_group: dist.ProcessGroup | None = None
    together: bool = False

    @property
    def num_microbatches(self) -> int:
        """Returns the number of microbatches whose tokens meet in this rank's experts."""
        return max(self.microbatch_of_source) + 1

    @property
    def num_parts(self) -> int:
        """Returns the number of sets of tokens that each expert is balanced over."""
        return 1 if self.together else self.num_microbatches


class MoNELayer(MoELayer):
    """Is a megatron-core MoE layer whose experts are :class:`~.experts.GroupedExperts`.

    Without neuron settings it is the MoE baseline. A ``BackendSpecProvider``
    (:mod:`mone_megatron.model.specs`) places it.
    """

    experts: GroupedExperts
    token_dispatcher: MoETokenDispatcher

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        sources: MicrobatchSources | None = None,
        **more: Any,
    ) -> None:
        """Builds the router, the dispatcher and the experts.

        Args:
            config: megatron-core's configuration of the model.
            submodules: router, experts and shared experts.
            layer_number: from 1; usually set later.
            pg_collection: process groups; None takes megatron-core's global ones.
            sources: see :class:`MicrobatchSources`; None for a single source.
            more: arguments that later releases of megatron-core give to their own layer.

        Raises:
            ValueError: when the dispatcher does not tell tokens of different microbatches apart.
        """
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **more)
        if can_dispatch_locally(config, self.token_dispatcher):
            self.token_dispatcher = LocalTokenDispatcher(config, pg_collection)
        self.sources = sources or MicrobatchSources((0,))
        dispatcher = config.moe_token_dispatcher_type
        if self.sources.num_parts > 1 and dispatcher not in ("alltoall", "allgather"):
            raise ValueError(
                f"parallel.dispatcher: {dispatcher} does not keep tokens in the order of their "
                "ranks, which the neuron balance loss of a microbatch needs; use alltoall or "
                "allgather, or mone.balance.scope=group"
            )
        self.row_counts = RowCounts(self.token_dispatcher)
        self.register_buffer("segment_ER", self._segment_of_each_source(), persistent=False)

    def set_layer_number(self, layer_number: int) -> None:
        """Numbers the layer (from 1) for logging."""
        super().set_layer_number(layer_number)
        self.experts.neuron_gate.layer_number = layer_number
        if isinstance(self.shared_experts, NeuronSharedExpert):
            self.shared_experts.neuron_gate.layer_number = layer_number

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Applies this rank's experts to the dispatched rows."""
        dispatcher = self.token_dispatcher
        if isinstance(dispatcher, LocalTokenDispatcher) and self.sources.num_parts == 1:
            sums_NH = self.experts.through(
                hidden_states,
                probs,
                dispatcher.rows(),
                self.sources.shared_group,
                self.sources.num_microbatches,
            )
            if sums_NH is not None:
                dispatcher.combined()
                return sums_NH, None
        rows_TH, rows_per_expert_E, row_probs_T = self.token_dispatcher.dispatch_postprocess(
            hidden_states, probs
        )
        # The same numbers twice: those of the dispatcher are on the host by now, where it needed
        # them, and bringing them back would wait for all that the GPU was given.
        groups = ops.RowGroups.of(
            rows_per_expert_E, self.row_counts.of_experts(rows_per_expert_E, rows_TH.device)
        )
        segments = self._segments(groups, len(rows_TH))
        if self.experts.neuron_gate.pools:
            segments = replace(segments, token_T=self.row_counts.tokens_of_rows(len(rows_TH)))
        if self.experts.neuron_gate.usage.collecting:
            segments = replace(segments, order=self.row_counts.order_of_rows(len(rows_TH)))
        output_TH, bias = self.experts(rows_TH, groups, row_probs_T, segments)
        return self.token_dispatcher.combine_preprocess(output_TH), bias

    def _segment_of_each_source(self) -> Tensor:
        """Returns the segment of each expert's rows from each source, int64 ``[E, R]``.

        Sources are in the order in which their rows lie within an expert.
        """
        microbatch_R = torch.tensor(self.sources.microbatch_of_source)
        if self.config.moe_token_dispatcher_type == "alltoall" and len(microbatch_R) > 1:
            # The group counts expert-parallel ranks first; this dispatcher gathers over the
            # tensor-parallel ranks last, so it orders rows by those first.
            microbatch_R = microbatch_R.view(-1, self.token_dispatcher.tp_size).T.flatten()
        expert_E = torch.arange(self.num_local_experts)
        return microbatch_R.unsqueeze(0) * self.num_local_experts + expert_E.unsqueeze(-1)

    def _segments(self, groups: ops.RowGroups, num_rows: int) -> Segments:
        """Returns the segment of each row; rows are sorted by expert, then by source rank."""
        num_microbatches, shared_group = self.sources.num_microbatches, self.sources.shared_group
        if self.sources.num_parts == 1:
            rows_E = groups.counts_on_device_E
            expert_E = torch.arange(self.num_local_experts, device=rows_E.device)
            index_T = expert_E.repeat_interleave(rows_E, output_size=num_rows)
            return Segments(index_T, 1, shared_group, in_order=True, weight=num_microbatches)
        rows_ER = self.row_counts.by_source().T
        segment_ER = self.get_buffer("segment_ER")
        index_T = segment_ER.flatten().repeat_interleave(rows_ER.flatten(), output_size=num_rows)
        return Segments(index_T, num_microbatches, shared_group)
