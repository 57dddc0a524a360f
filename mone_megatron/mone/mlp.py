"""Selects neurons in the MLPs that every token visits: dense layers and shared experts.

Each is one expert of the method. Tensor parallelism spreads its neurons over ranks; all of them
see all tokens of the microbatch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.mone.chunk_unions import TokenOrder
from mone_megatron.mone.megatron_settings import GATED_MLP, SHARED_EXPERT, refuse_unread
from mone_megatron.mone.neurons import NeuronGate, NeuronSettings, Segments


def _neuron_gate(config: TransformerConfig, neurons: int, settings: NeuronSettings) -> NeuronGate:
    return NeuronGate(
        config=config,
        settings=settings,
        neurons=neurons,
        num_experts=1,
        num_local_experts=1,
        first_expert=0,
        neuron_group=parallel_state.get_tensor_model_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _forward(mlp: MLP, gate: NeuronGate, hidden_states: Tensor) -> tuple[Tensor, None]:
    """Computes a gated MLP with neuron selection: ``[s, b, h]`` to ``[s, b, h]``, and no bias."""
    gate_up, _ = mlp.linear_fc1(hidden_states)
    gate_TF, up_TF = ops.halves(gate_up.flatten(0, -2))
    index_T = torch.zeros(gate_TF.shape[0], dtype=torch.long, device=gate_TF.device)

    def project_down(hidden_TF: Tensor) -> Tensor:
        output: Tensor = mlp.linear_fc2(hidden_TF.view(*gate_up.shape[:-1], -1))[0]
        return output

    context_group, order = _context_group(), None
    if gate.usage.collecting and context_group is None:
        # Every row is a token, in the order of megatron-core.
        tokens = len(index_T)
        token_T = torch.arange(tokens, device=index_T.device)
        order = TokenOrder(token_T, tokens, gate_up.shape[1])
    segments = Segments(index_T, 1, context_group, in_order=True, order=order)
    return gate(gate_TF, up_TF, None, segments, project_down, partial(down_norm, mlp)), None


def down_norm(mlp: MLP) -> Tensor:
    """Returns the norm of each neuron's column of the down projection, fp32 ``[1, F]``."""
    # One expert, whose down projection is stored with the neurons last.
    weight_HF = mlp.linear_fc2.weight
    return torch.linalg.vector_norm(weight_HF, dim=0, keepdim=True, dtype=torch.float32)


def _context_group() -> dist.ProcessGroup | None:
    """Returns the ranks that each hold a part of every sequence; None for this one alone."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return None
    group: dist.ProcessGroup = parallel_state.get_context_parallel_group()
    return group


class NeuronMLP(MLP):
    """Is a dense gated layer with neuron selection."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        neurons: NeuronSettings,
        ffn_hidden_size: int | None = None,
        tp_group: dist.ProcessGroup | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        """Builds megatron-core's MLP, with the selection's settings.

        Args:
            config: megatron-core's configuration of the model.
            submodules: the two linear layers.
            neurons: neuron selection and balance.
            ffn_hidden_size: neurons over all ranks; None for the configuration's.
            tp_group: the tensor-parallel ranks; what megatron-core 0.16 gives.
            pg_collection: process groups; what later releases give instead.
            more: what those give beside it (a name, whether it predicts further tokens), which
                only their layers of many experts read.

        Raises:
            ValueError: for settings that it does not read.
        """
        refuse_unread("NeuronMLP", config, GATED_MLP)
        if pg_collection is not None:
            tp_group = pg_collection.tp
        width = ffn_hidden_size or config.ffn_hidden_size
        super().__init__(config, submodules, ffn_hidden_size=width, tp_group=tp_group)
        self.neuron_gate = _neuron_gate(config, width, neurons)

    def set_layer_number(self, layer_number: int) -> None:
        """Numbers the layer (from 1) for logging."""
        self.neuron_gate.layer_number = layer_number

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """Maps ``[s, b, h]`` to ``[s, b, h]``, and no bias."""
        return _forward(self, self.neuron_gate, hidden_states)


class NeuronSharedExpert(SharedExpertMLP):
    """Is a shared expert with neuron selection."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        neurons: NeuronSettings,
        pg_collection: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        """Builds megatron-core's shared expert, with the selection's settings.

        Args:
            config: megatron-core's configuration of the model.
            submodules: the two linear layers.
            gate: whether its output is weighted by a gate of its own.
            neurons: neuron selection and balance.
            pg_collection: megatron-core's process groups.
            more: arguments that later releases of megatron-core give to their own.

        Raises:
            ValueError: for settings that it does not read.
        """
        refuse_unread("NeuronSharedExpert", config, SHARED_EXPERT)
        super().__init__(config, submodules, gate, pg_collection, **more)
        assert config.moe_shared_expert_intermediate_size is not None
        self.neuron_gate = _neuron_gate(config, config.moe_shared_expert_intermediate_size, neurons)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps ``[s, b, h]`` to ``[s, b, h]``."""
        output, _ = _forward(self, self.neuron_gate, hidden_states)
        if self.gate_weight is not None:
            output = output * torch.sigmoid(
                torch.nn.functional.linear(hidden_states, self.gate_weight)
            )
        return output
