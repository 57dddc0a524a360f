"""Builds the layers of an export of vLLM's parts: its attention, linear layers and experts.

Shape suffixes: N tokens, F neurons of an MLP on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.qwen3_moe import Qwen3MoeAttention
from vllm.model_executor.models.utils import extract_layer_index

from mone_vllm.definition.methods.rule import STATE_PREFIX
from mone_vllm.experts import SelectingExperts, experts_class
from mone_vllm.ranks import TensorParallelRanks
from mone_vllm.routing import route_of
from mone_vllm.selection import Selection, activation_of


class AllHeadsRMSNorm(nn.Module):
    """Normalises all heads of a token together by RMS (OLMoE), also those of other ranks."""

    def __init__(self, heads: int, all_heads: int, head_dim: int, eps: float) -> None:
        """Prepares for ``heads`` of ``all_heads`` heads."""
        super().__init__()
        self.heads, self.all_heads, self.head_dim, self.eps = heads, all_heads, head_dim, eps
        self.ranks = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(heads * head_dim))
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, parameter: Tensor, loaded: Tensor) -> None:
        """Takes this rank's heads; few heads are on several ranks each."""
        width = self.heads * self.head_dim
        copies = self.ranks * self.heads // self.all_heads
        start = get_tensor_model_parallel_rank() // copies * width
        parameter.data.copy_(loaded.narrow(0, start, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[..., heads, head_dim]``."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            # Heads that are on several ranks count once.
            squares = tensor_model_parallel_all_reduce(squares)
            squares = squares * (self.all_heads / (self.heads * self.ranks))
        flat = flat * torch.rsqrt(squares / (self.all_heads * self.head_dim) + self.eps)
        return (flat.to(x.dtype) * self.weight).view_as(x)


class MoneAttention(Qwen3MoeAttention):
    """Is vLLM's attention of Qwen3-MoE with our choice of QK-norm."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rope_parameters=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=config.qkv_bias,
            head_dim=config.head_dim,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        norms: dict[str, nn.Module] = {}
        if config.qk_norm == "none":
            norms = {"q_norm": nn.Identity(), "k_norm": nn.Identity()}
        elif config.qk_norm == "all_heads":
            norms = {
                name: AllHeadsRMSNorm(heads, all_heads, self.head_dim, config.rms_norm_eps)
                for name, heads, all_heads in (
                    ("q_norm", self.num_heads, self.total_num_heads),
                    ("k_norm", self.num_kv_heads, self.total_num_kv_heads),
                )
            }
        elif config.qk_norm != "head":
            raise ValueError(f"config.qk_norm: {config.qk_norm!r} is not none, head or all_heads")
        for name, norm in norms.items():
            setattr(self, name, norm)


# An op, so that torch.compile, which would round otherwise than the definition, does not look in.
@torch.library.custom_op("mone::hidden", mutates_args=())
def hidden_op(gate_up: Tensor, layer_name: str) -> Tensor:
    """Returns the kept neurons' values ``[N, F]`` of an MLP's projections ``[N, 2 F]``."""
    mlp = get_forward_context().no_compile_layers[layer_name]
    hidden: Tensor = mlp.hidden(gate_up)
    return hidden


@hidden_op.register_fake
def _(gate_up: Tensor, layer_name: str) -> Tensor:
    """Returns an uninitialised tensor of the op's shape, ``[N, F]``."""
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _take(
    state: dict[str, Tensor], prefix: str, held: dict[str, Tensor], here_A: Tensor | None = None
) -> None:
    """Fills in a rule's state from what an export holds.

    Args:
        state: by name; replaced.
        prefix: of the module's tensors in the export.
        held: of the whole export, by name; what is taken is removed.
        here_A: the number here of each expert, -1 for those of other ranks; None for all here.

    Raises:
        ValueError: a part is missing.
    """
    for name, initial_E in state.items():
        full_A = held.pop(f"{prefix}{STATE_PREFIX}{name}", None)
        if full_A is None:
            raise ValueError(f"{prefix}{STATE_PREFIX}{name}: the export has no such tensor")
        value_E = initial_E.clone()
        if here_A is None:
            value_E.copy_(full_A)
        else:
            there = here_A.to(full_A.device) >= 0
            value_E[here_A[here_A >= 0].long()] = full_A[there].to(value_E.device)
        state[name] = value_E


class MoneMLP(nn.Module):
    """Computes a dense layer or shared expert, with neuron selection where the settings say so."""

    def __init__(
        self,
        config: Any,
        width: int,
        target: str,
        prefix: str,
        *,
        reduce_results: bool = True,
        expert_gate: nn.Module | None = None,
    ) -> None:
        """Prepares an MLP of ``width`` neurons.

        Args:
            config: the model's.
            width: f.
            target: as in ``config.mone.apply_to``.
            prefix: the name of this module.
            reduce_results: whether the ranks' results are summed here.
            expert_gate: a factor on the result, through a sigmoid.
        """
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=False,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.expert_gate = expert_gate
        self.activate = activation_of(config.hidden_act)
        ranks = TensorParallelRanks() if get_tensor_model_parallel_world_size() > 1 else None
        self.selection = Selection.of(config.mone, target, width, self.activate, ranks)
        # Filled in when the weights are there, before vLLM packs them.
        self.register_buffer(
            "down_norm_F", torch.full((self.down_proj.weight.shape[1],), torch.nan)
        )
        self.state = {} if self.selection is None else self.selection.initial_state(1)
        self.layer_name = prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def remember_norms(self) -> None:
        """Keeps the norms of the down projection's rows, for scores that read them."""
        norms = torch.linalg.vector_norm(self.down_proj.weight, dim=0, dtype=torch.float32)
        self.down_norm_F = norms

    def take_state(self, held: dict[str, Tensor]) -> None:
        """Takes this MLP's part of the rule's state out of what an export holds, by name."""
        _take(self.state, f"{self.layer_name}.", held)

    def hidden(self, gate_up: Tensor) -> Tensor:
        """Returns the input of the down projection, ``[N, F]``, of projections ``[N, 2 F]``."""
        if self.selection is None:
            gate_TF, up_TF = gate_up.chunk(2, dim=-1)
            return self.activate(gate_TF) * up_TF
        norms = self.down_norm_F if self.selection.reads_down_norm else None
        return self.selection.hidden(gate_up, down_norm_TF=norms, state=self.state)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, H]`` to ``[N, H]``."""
        gate_up, _ = self.gate_up_proj(x)
        output: Tensor = self.down_proj(torch.ops.mone.hidden(gate_up, self.layer_name))[0]
        if self.expert_gate is not None:
            output = F.sigmoid(self.expert_gate(x)[0]) * output
        return output


class MoneSparseMoeBlock(nn.Module):
    """Holds the router, the routed experts, and the shared expert if there is one."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        # As the model was trained: the router's products are fp32 whatever the weights are.
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        if config.router_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.gate.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.shared_expert_gate = self.shared_expert = None
        if width := config.shared_expert_intermediate_size:
            if config.shared_expert_gate:
                self.shared_expert_gate = ReplicatedLinear(
                    config.hidden_size, 1, bias=False, prefix=f"{prefix}.shared_expert_gate"
                )
            self.shared_expert = MoneMLP(
                config,
                width,
                "shared",
                f"{prefix}.shared_expert",
                reduce_results=False,
                expert_gate=self.shared_expert_gate,
            )
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_expert,
            gate=self.gate,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            custom_routing_function=route_of(config, self.gate),
            prefix=f"{prefix}.experts",
        )
        experts = self.experts.routed_experts
        shards = experts.moe_config.moe_parallel_config.tp_size
        activate = activation_of(config.hidden_act)
        ranks = TensorParallelRanks() if shards > 1 else None
        self.selection = Selection.of(
            config.mone, "routed", config.moe_intermediate_size, activate, ranks
        )
        # vLLM's own experts know all neurons of a SwiGLU.
        self.needs_ours = self.selection is not None or config.hidden_act != "silu"
        local = experts.moe_config.num_local_experts
        self.state = {} if self.selection is None else self.selection.initial_state(local)
        if self.needs_ours:
            method = experts.quant_method
            method.experts_cls = experts_class(
                method.experts_cls, self.selection, activate, experts.layer_name, self.state
            )

    def take_state(self, held: dict[str, Tensor]) -> None:
        """Takes the experts' part of the rule's state, of those that are on this rank."""
        here_A = self.experts.routed_experts.expert_map
        _take(self.state, f"{self.experts.layer_name}.", held, here_A)

    def check_experts(self) -> None:
        """Checks that our experts are what runs, where they are needed.

        Raises:
            ValueError: naming what does.
        """
        kernel = self.experts.routed_experts.quant_method.moe_kernel
        running = None if kernel is None else kernel.fused_experts
        if not self.needs_ours or isinstance(running, SelectingExperts):
            return
        raise ValueError(
            f"{self.experts.layer_name}: computed by {type(running).__name__}, which does not "
            "select neurons (config.mone), so the answer would be another model's"
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps ``[N, H]`` to ``[N, H]``."""
        # The experts' layer has the router.
        output: Tensor = self.experts(hidden_states=hidden_states, router_logits=hidden_states)
        return output


class MoneDecoderLayer(nn.Module):
    """Holds attention, the MLP or MoE block, and the norms of one layer."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.self_attn = MoneAttention(config, vllm_config, f"{prefix}.self_attn")
        if config.num_experts and extract_layer_index(prefix) not in (config.mlp_only_layers or []):
            self.mlp: nn.Module = MoneSparseMoeBlock(config, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = MoneMLP(config, config.intermediate_size, "dense", f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output, and the residual that is yet to be added to it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual
