"""Computes a rank's routed experts: three weights a neuron, one grouped product a projection.

That is with the usual gate; which weights others have is theirs to say
(:mod:`mone_megatron.methods.gates`).

The same class is the MoE baseline (no neuron settings) and MoNE, on CPU and GPU, through
:func:`mone_megatron.kernels.ops.grouped_mm`.

With the usual gate a neuron k of expert e is three rows of length h:
``gate_up_weight[e, 0, k]`` (gate), ``gate_up_weight[e, 1, k]`` (up) and ``down_weight[e, k]``, each
contiguous, so that tensor parallelism inside experts is a slice of the neuron axis and sparse
decoding reads whole rows.

Shape suffixes: T rows (a token once per chosen expert), H hidden size, F neurons of one expert on
this rank, E experts on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mone_megatron.kernels import ops
from mone_megatron.methods.gate import GateSize, Product, Products
from mone_megatron.methods.gates import GATES
from mone_megatron.module_calls import calls_only
from mone_megatron.mone.megatron_settings import ROUTED_EXPERTS, refuse_unread
from mone_megatron.mone.neurons import NeuronGate, NeuronSettings, Segments
from mone_megatron.mone.sparsity import Sparsity


class _Gathered(torch.autograd.Function):
    """Gathers columns over ranks that each use all of them; so their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, part_TQ: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part_TQ) for _ in range(group.size())]
        dist.all_gather(parts, part_TQ.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_TQ = grads[0].clone()
        dist.all_reduce(grad_TQ, group=ctx.group)
        return grad_TQ.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None


class GroupedExperts(MegatronModule):
    """Computes the gated experts of a rank together, with neuron selection when it is asked for."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        neurons: NeuronSettings | None = None,
        sparsity: Sparsity | None = None,
        name: str | None = None,
        gate: str = "full",
        gate_rank: int = 0,
    ) -> None:
        """Allocates the experts of this rank; :mod:`mone_megatron.model.initialize` fills them.

        Args:
            num_local_experts: E, the experts on this rank.
            config: megatron-core's; ``moe_ffn_hidden_size`` is f over all ranks.
            pg_collection: with ``ep``, ``expt_tp`` and ``expt_dp``.
            neurons: neuron selection and balance; None for plain experts.
            sparsity: the loss on hidden values; None for none.
            name: a name that megatron-core gives its modules from 0.17 on; not used.
            gate: how gate and up projections are computed, a name in
                :data:`mone_megatron.methods.gates.GATES`.
            gate_rank: q, for gates that read it.

        Raises:
            ValueError: for settings that it does not read (biases, clamped activations, fp8, ...),
                or a keep ratio of no neuron.
        """
        super().__init__(config=config)
        refuse_unread("GroupedExperts", config, ROUTED_EXPERTS)
        assert config.moe_ffn_hidden_size is not None
        self.num_local_experts = num_local_experts
        self.expert_group = pg_collection.ep
        self.tensor_group = pg_collection.expt_tp
        self.replica_group = pg_collection.expt_dp
        self.neurons_per_rank = config.moe_ffn_hidden_size // self.tensor_group.size()
        self.gate = GATES[gate]
        size = GateSize(config.hidden_size, config.moe_ffn_hidden_size, gate_rank)
        # What the experts' weights are, but for the down projection.
        self.gate_weights = self.gate.weights(size)
        for weight_name, weight in self.gate_weights.items():
            *outer, rows, columns = (num_local_experts, *weight.shape)
            shape = (*outer, rows // self.tensor_group.size(), columns)
            setattr(self, weight_name, self._parameter(shape, split_dim=len(outer)))
        shape = (num_local_experts, self.neurons_per_rank, config.hidden_size)
        self.down_weight = self._parameter(shape, split_dim=1)
        self.neuron_gate = NeuronGate(
            config=config,
            settings=neurons,
            neurons=config.moe_ffn_hidden_size,
            num_experts=num_local_experts * self.expert_group.size(),
            num_local_experts=num_local_experts,
            first_expert=num_local_experts * self.expert_group.rank(),
            neuron_group=self.tensor_group,
            replica_group=self.replica_group,
            sparsity=sparsity,
        )

    def _parameter(self, shape: tuple[int, ...], split_dim: int) -> nn.Parameter:
        device = torch.device("cpu")
        if not self.config.use_cpu_initialization:
            device = torch.device("cuda", torch.cuda.current_device())
        parameter = nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        # megatron-core reads these. `allreduce` decides whose gradients are reduced over the
        # data-parallel ranks; the library asks only whether EP > 1, which trains wrong in
        # silence when the expert ranks differ from the dense ones in any other way.
        dense_like = (
            self.expert_group.size() == 1
            and self.tensor_group.size() == parallel_state.get_tensor_model_parallel_world_size()
        )
        parameter.allreduce = dense_like  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = split_dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
        return parameter

    def forward(
        self,
        tokens_TH: Tensor,
        groups: ops.RowGroups,
        probs_T: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, None]:
        """Applies each expert to its rows.

        Args:
            tokens_TH: rows sorted by expert.
            groups: the rows of each expert.
            probs_T: the router's probability of each row.
            segments: which rows belong together for the balance loss.

        Returns:
            ``[T, H]`` outputs (partial sums when the neurons are spread over ranks), and no bias.
        """
        if tokens_TH.shape[0] == 0:
            # grouped_mm takes no empty matrix, but ranks must call the same collectives.
            gate_TF, up_TF = self._project(
                tokens_TH, lambda rows, weight: rows @ weight[0].flatten(0, -2).T
            )
            hidden_TF = self.neuron_gate(
                gate_TF, up_TF, probs_T, segments, down_norm=self.down_norm
            )
            return hidden_TF @ self.down_weight[0], None

        def project_down(hidden_TF: Tensor) -> Tensor:
            return ops.expert_product(hidden_TF, self.down_weight, groups)

        gate_TF, up_TF = self.project(tokens_TH, groups)
        output_TH = self.neuron_gate(
            gate_TF, up_TF, probs_T, segments, project_down, self.down_norm
        )
        return output_TH, None

    def through(
        self,
        tokens_NH: Tensor,
        probs_NA: Tensor,
        rows: ops.Rows,
        shared_group: dist.ProcessGroup | None,
        microbatches: int,
    ) -> Tensor | None:
        """Returns each token's sum over its experts, ``[N, H]``; None where no kernel does so.

        Args:
            tokens_NH: tokens, all of whose experts are on this rank.
            probs_NA: the router's probability of each expert, 0 for those that are not chosen.
            rows: of the experts.
            shared_group: see :class:`~.neurons.Segments`.
            microbatches: whose tokens these are.
        """
        choice = self.neuron_gate.choice()
        usual = calls_only(self, GroupedExperts) and self.gate.name == "full"
        if choice is None or not usual:
            return None
        weights = self.get_parameter("gate_up_weight"), self.down_weight
        done = ops.through_experts(tokens_NH, probs_NA, *weights, rows, choice)
        if done is None:
            return None
        sums_NH, weight_sum_AF, kept_AF = done
        if weight_sum_AF is None or kept_AF is None:
            return sums_NH
        return self.neuron_gate.attach_balance(
            sums_NH, weight_sum_AF, kept_AF, rows.counts_A.float(), shared_group, microbatches
        )

    def project(self, tokens_TH: Tensor, groups: ops.RowGroups) -> tuple[Tensor, Tensor]:
        """Returns gate and up projections ``[T, F]`` of some rows ``[T, H]``, sorted by expert."""
        return self._project(
            tokens_TH,
            lambda rows, weight: ops.expert_product(rows, weight, groups, outputs_first=True),
        )

    def _project(self, tokens_TH: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        """Returns gate and up projections ``[T, F]`` of rows ``[T, H]``."""
        weights = {name: self.get_parameter(name) for name in self.gate_weights}
        return self.gate.project(
            tokens_TH, weights, Products(product, whole=self._whole, halves=ops.halves)
        )

    def _whole(self, part_TQ: Tensor) -> Tensor:
        """Returns the columns of all ranks that share the experts, side by side."""
        if self.tensor_group.size() == 1:
            return part_TQ
        gathered: Tensor = _Gathered.apply(part_TQ, self.tensor_group)
        return gathered

    def down_norm(self) -> Tensor:
        """Returns the norm of each neuron's row of the down projection, fp32 ``[E, F]``."""
        return torch.linalg.vector_norm(self.down_weight, dim=-1, dtype=torch.float32)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Returns the weights as global tensors, which any EP and ETP can load.

        With the usual gate they are ``[num_experts, 2, f, h]`` and ``[num_experts, f, h]``."""
        tensors: ShardedStateDict = {}
        axes = len(sharded_offsets)
        for name, parameter in self.named_parameters(recurse=False):
            tensors[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                (axes, self.expert_group.rank(), self.expert_group.size()),
                (
                    axes + parameter.partition_dim,
                    self.tensor_group.rank(),
                    self.tensor_group.size(),
                ),
                replica_id=(0, 0, self.replica_group.rank()),
                prepend_axis_num=axes,
            )
        if self.neuron_gate.selector is not None:
            tensors |= self.neuron_gate.selector.sharded_state_dict(
                f"{prefix}neuron_gate.selector.", sharded_offsets, metadata
            )
        return tensors

    def backward_dw(self) -> None:
        """Does nothing: weight gradients are computed in the backward pass, and none is delayed."""
