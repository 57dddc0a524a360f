"""Defines the exported model for transformers: Qwen3-MoE's, with our choices and selection.

Everything that is not a choice of ours is transformers' own code, by inheritance, so generation,
caches, attention implementations, gradient checkpointing, PEFT and ``Trainer`` come with it. This
file is copied into exported models and loads there with ``trust_remote_code=True``.

Shape suffixes: N tokens, H hidden size, A all experts, K experts of a token, G groups of experts,
T rows (a token once for each of its experts), F neurons of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.experts_mone import (
    NeuronSettings,
    asked_to_select,
    hold_state,
    register_experts,
    reset_state,
    state_of,
    watch_experts,
)
from mone_megatron.hf.guard_mone import guard, note_selected, refuse_replaced, watch
from mone_megatron.hf.parallel_mone import Neurons
from mone_megatron.kernels.product_keys import ProductKeySizes, choose, product_key_experts
from mone_megatron.methods.gate import GateSize, GateWeight, Product, Products
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.router import RouterSettings, hold_weight

register_experts()


def _settings(config: MoneConfig, target: str) -> NeuronSettings | None:
    if config.mone is None:
        return None
    settings = NeuronSettings.from_config(config.mone)
    return settings if target in settings.apply_to else None


def _checked_settings(config: MoneConfig, target: str, neurons: int) -> NeuronSettings | None:
    """Returns the settings of an MLP of ``neurons`` neurons; None where it is not to select.

    Raises:
        ValueError: the settings are wrong, or wrong for an MLP of this width.
    """
    settings = _settings(config, target)
    if settings is not None:
        settings.check(neurons)
    return settings


class AllHeadsRMSNorm(nn.Module):
    """Normalises ``[..., heads, head_dim]`` by an RMSNorm over all heads together (OLMoE).

    It is no subclass of the library's norm: kernels that replace that one's forward
    (``use_kernels``) replace its subclasses', too, by a norm over the last axis.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the input, normalised over its last two axes in fp32."""
        flat = hidden_states.flatten(-2).float()
        scale = torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = self.weight * (flat * scale).to(hidden_states.dtype)
        return normed.view_as(hidden_states)


class MoneAttention(Qwen3MoeAttention):
    """Computes GQA with the family's norms and biases."""

    def __init__(self, config: MoneConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.head_dim is not None
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        if config.qkv_bias:
            self.q_proj = nn.Linear(config.hidden_size, queries, bias=True)
            self.k_proj = nn.Linear(config.hidden_size, keys, bias=True)
            self.v_proj = nn.Linear(config.hidden_size, keys, bias=True)
        if config.qk_norm == "none":
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        elif config.qk_norm == "all_heads":
            eps = config.rms_norm_eps
            self.q_norm = AllHeadsRMSNorm(queries, eps)  # type: ignore[assignment]
            self.k_norm = AllHeadsRMSNorm(keys, eps)  # type: ignore[assignment]
        elif config.qk_norm != "head":
            raise ValueError(f"qk_norm: {config.qk_norm!r} is not none, head or all_heads")


class MoneLatentAttention(DeepseekV2Attention):
    """Computes multi-latent attention as DeepSeek-V2 does, with our epsilon in its norms."""

    def __init__(self, config: MoneConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        # Theirs have an epsilon of their own.
        for norm in (self.q_a_layernorm, self.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = config.rms_norm_eps


class MoneMLP(Qwen3MoeMLP):
    """Computes a dense layer or shared expert, with neuron selection where the settings say so."""

    def __init__(self, config: MoneConfig, intermediate_size: int, target: str) -> None:
        super().__init__(config, intermediate_size)
        self.mone_target = target
        self.rectified_up = config.rectified_up
        self.neurons = _checked_settings(config, target, intermediate_size)
        if self.neurons is not None:
            hold_state(self, self.neurons, intermediate_size, 1)
        watch(self, asked_to_select)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output ``[..., h]`` of tokens ``[..., h]``."""
        note_selected(self)
        if self.neurons is None and not self.rectified_up:
            output: Tensor = super().forward(x)
            return output
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.rectified_up:
            up = up.relu()
        if self.neurons is None:
            dense: Tensor = self.down_proj(self.act_fn(gate) * up)
            return dense
        neurons = Neurons(f"the {self.mone_target} MLP", self.intermediate_size)
        if gate.shape[-1] != self.intermediate_size:
            weight = self.gate_proj.weight
            neurons = Neurons.of(neurons.owner, neurons.count, weight, neuron_dim=0)
        state = state_of(self, self.neurons)
        hidden = self.neurons.select(gate, up, self.act_fn, neurons, self._down_norm, state)
        selected: Tensor = self.down_proj(hidden)
        return selected

    @torch.no_grad()
    def _down_norm(self) -> Tensor:
        """Returns the norm of each of this rank's rows of the down projection, fp32 ``[F]``."""
        weight = self.down_proj.weight
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)


@use_experts_implementation
class MoneExperts(nn.Module):
    """Holds the routed experts' weights, which transformers' implementations compute with."""

    def __init__(self, config: MoneConfig) -> None:
        super().__init__()
        stock = Qwen3MoeExperts(config)
        self.num_experts, self.hidden_dim = stock.num_experts, stock.hidden_dim
        self.intermediate_dim = stock.intermediate_dim
        self.down_proj, self.act_fn = stock.down_proj, stock.act_fn
        self.gate_weights: Mapping[str, GateWeight] = {}
        # Whether places of a token's experts may be filled with some that it did not choose, of
        # weight 0 (:class:`MoneRouter`).
        self.any_count = not config.router.fixed_count
        if config.gate == "full":
            self.gate_up_proj = stock.gate_up_proj
        else:
            self._own_gate(config)
        settings = _checked_settings(config, "routed", self.intermediate_dim)
        if settings is not None:
            hold_state(self, settings, self.intermediate_dim, self.num_experts)
        watch_experts(self)

    def _own_gate(self, config: MoneConfig) -> None:
        """Allocates the weights of a gate that is not the usual one."""
        self.gate = GATES[config.gate]
        size = GateSize(self.hidden_dim, self.intermediate_dim, config.gate_rank)
        if problem := self.gate.problem(size):
            raise ValueError(f"gate_rank: {config.gate_rank} {problem}")
        self.gate_weights = self.gate.weights(size)
        for name, weight in self.gate_weights.items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(self.num_experts, *weight.shape))
            )

    def gate_and_up(self, rows_TH: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        """Returns gate and up projections ``[T, F]`` of rows ``[T, H]``."""
        if not self.gate_weights:
            gate_TF, up_TF = product(rows_TH, self.gate_up_proj).chunk(2, dim=-1)
            return gate_TF, up_TF
        weights = {name: self.get_parameter(name) for name in self.gate_weights}
        return self.gate.project(rows_TH, weights, Products(product))

    def __getattr__(self, name: str) -> Any:
        """Gives tools that look at the usual weights what the gate's come to, computed anew.

        Projections are linear, so those of the unit vectors are the matrices.
        """
        if name != "gate_up_proj" or not self.gate_weights:
            return super().__getattr__(name)
        units_HH = torch.eye(
            self.hidden_dim, dtype=self.down_proj.dtype, device=self.down_proj.device
        )
        units_EHH = units_HH.expand(self.num_experts, -1, -1)
        both = MoneExperts.gate_and_up(self, units_EHH, lambda rows, weight: rows @ weight.mT)
        return torch.cat(both, dim=-1).mT

    def forward(self, *args: Tensor) -> Tensor:
        """Raises an error: the eager way would not select neurons."""
        raise ValueError(
            'experts_implementation "eager" does not select neurons; use "mone" or '
            '"mone_batched_mm" ("grouped_mm" computes all neurons)'
        )


# Under its name a patch of transformers may hold another class while a model is made.
_OUR_EXPERTS = MoneExperts


class MoneRouter(Qwen3MoeTopKRouter):
    """Routes as training does, computed in fp32."""

    def __init__(self, config: MoneConfig) -> None:
        super().__init__(config)
        self.method = config.router
        self.settings = RouterSettings(
            experts=config.num_experts,
            hidden=config.hidden_size,
            experts_per_token=config.num_experts_per_tok,
            options=self.method.read_options(config.router_settings or {}),
        )
        self.method_weights = dict(self.method.weights(self.settings))
        for name, weight in self.method_weights.items():
            hold_weight(self, name, nn.Parameter(torch.zeros(weight.shape)))
        self.score_function = config.router_score_function
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score_function: {self.score_function!r} is unknown")
        self.scaling_factor = config.router_scaling_factor
        self.groups, self.topk_groups = config.n_group, config.topk_group
        if config.router_bias:
            bias = torch.zeros(self.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        else:
            self.e_score_correction_bias = None

    def _choose(self, scores_NA: Tensor) -> Tensor:
        """Returns the experts of the largest scores ``[N, K]``, in the best groups if there are."""
        if self.topk_groups:
            scores_NGE = scores_NA.unflatten(-1, (self.groups, -1))
            # A group is as good as its best (K / chosen groups) experts together.
            best = scores_NGE.topk(self.top_k // self.topk_groups, dim=-1).values.sum(dim=-1)
            chosen_NK = best.topk(self.topk_groups, dim=-1, sorted=False).indices
            left_out_NG = torch.ones_like(best, dtype=torch.bool).scatter(-1, chosen_NK, False)
            scores_NA = scores_NGE.masked_fill(left_out_NG.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores_NA.topk(self.top_k, dim=-1).indices

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits ``[N, A]``, and the chosen experts' weights and numbers ``[N, K]``.

        Where tokens have different numbers of experts, K is the largest of these numbers, and other
        experts with weight 0 fill the places of the other tokens.
        """
        tokens_NH = hidden_states.reshape(-1, self.hidden_dim)
        held = {name: self.get_parameter(name) for name in self.method_weights}
        logits_NA = self.method.logits(tokens_NH.float(), held, _linear, self.settings)
        if self.method.assign is not None:
            weights_NA = self.method.assign(logits_NA, self.settings)
            most = int((weights_NA > 0).sum(dim=-1).max().clamp_min(1)) if len(weights_NA) else 1
            weights_NK, index_NK = weights_NA.sort(dim=-1, descending=True, stable=True)
            weights_NK, index_NK = weights_NK[:, :most], index_NK[:, :most]
            if self.method.weigh is not None:
                weighed_NA = self.method.weigh(weights_NA, held, self.settings)
                weights_NK = weighed_NA.gather(-1, index_NK)
            return logits_NA, weights_NK.to(hidden_states.dtype), index_NK
        if self.score_function == "sigmoid":
            scores_NA = logits_NA.sigmoid()
            biased_NA = scores_NA
            if self.e_score_correction_bias is not None:
                biased_NA = scores_NA + self.e_score_correction_bias
            index_NK = self._choose(biased_NA)
            weights_NK = scores_NA.gather(-1, index_NK)
            if self.top_k > 1:
                weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.norm_topk_prob:
            index_NK = self._choose(logits_NA)
            weights_NK = logits_NA.gather(-1, index_NK).softmax(dim=-1)
        else:
            scores_NA = logits_NA.softmax(dim=-1)
            index_NK = self._choose(scores_NA)
            weights_NK = scores_NA.gather(-1, index_NK)
        weights_NK = weights_NK * self.scaling_factor
        return logits_NA, weights_NK.to(hidden_states.dtype), index_NK


def _linear(tokens: Tensor, weight: Tensor) -> Tensor:
    """Returns tokens times a transposed matrix, in fp32."""
    return F.linear(tokens, weight.float())


class RectifiedMoneExperts(MoneExperts):
    """Holds experts whose up projections are max(u, 0)."""

    # Read where experts select (:mod:`.experts_mone`), which is then of max(u, 0), too.
    rectifies_up = True

    def gate_and_up(self, rows_TH: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        """Returns gate and rectified up projections ``[T, F]`` of rows ``[T, H]``."""
        gate_TF, up_TF = super().gate_and_up(rows_TH, product)
        return gate_TF, up_TF.relu()

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        hidden: Tensor = self.act_fn(gate) * up.relu()
        return hidden


class MoneSparseMoeBlock(nn.Module):
    """Computes router, routed experts, and the shared expert if there is one."""

    def __init__(self, config: MoneConfig) -> None:
        super().__init__()
        self.config = config
        self.experts = (RectifiedMoneExperts if config.rectified_up else MoneExperts)(config)
        self.gate = MoneRouter(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = MoneMLP(config, width, "shared") if width else None
        self.shared_expert_gate = None
        if width and config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the output ``[B, S, H]`` of tokens ``[B, S, H]``."""
        if _settings(self.config, "routed") is not None:
            refuse_replaced(self.experts, "experts")
        tokens_NH = hidden_states.flatten(0, -2)
        _, weights_NK, index_NK = self.gate(tokens_NH)
        output_NH: Tensor = self.experts(tokens_NH, index_NK, weights_NK)
        if self.shared_expert is not None:
            shared_NH = self.shared_expert(tokens_NH)
            if self.shared_expert_gate is not None:
                shared_NH = shared_NH * self.shared_expert_gate(tokens_NH).sigmoid()
            output_NH = output_NH + shared_NH
        return output_NH.view_as(hidden_states)


class MoneProductKeyExperts(nn.Module):
    """Computes experts of a single neuron that are found by product keys, in an MLP's place."""

    def __init__(self, config: MoneConfig) -> None:
        super().__init__()
        assert config.product_key is not None
        try:
            self.sizes = ProductKeySizes(**config.product_key)
        except TypeError as error:
            raise ValueError(
                f"product_key: {config.product_key} is not understood ({error})"
            ) from None
        for name, shape in self.sizes.weights(config.hidden_size).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.act_fn = ACT2FN[config.hidden_act]

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        return dict(self.named_parameters(recurse=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns the output ``[..., H]`` of tokens ``[..., H]``."""
        output_NH = product_key_experts(
            hidden_states.flatten(0, -2), self._weights, self.sizes, self.act_fn
        )
        return output_NH.view_as(hidden_states)

    def choose(self, tokens_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each head's experts: scores, fp32, and numbers, ``[N, heads, experts]`` each."""
        return choose(tokens_NH, self._weights, self.sizes)


class MoneDecoderLayer(Qwen3MoeDecoderLayer):
    """Computes one layer: attention, then a dense MLP, routed experts or those of product keys."""

    def __init__(self, config: MoneConfig, layer_idx: int) -> None:
        with torch.device("meta"):  # what it builds is replaced
            super().__init__(config, layer_idx)
        attention: nn.Module
        if config.attention_type == "mla":
            attention = MoneLatentAttention(config, layer_idx)
        else:
            attention = MoneAttention(config, layer_idx)
        mlp: nn.Module
        if config.product_key is not None:
            mlp = MoneProductKeyExperts(config)
        elif config.num_experts and layer_idx not in (config.mlp_only_layers or []):
            mlp = MoneSparseMoeBlock(config)
        else:
            mlp = MoneMLP(config, config.intermediate_size, "dense")
        self.self_attn, self.mlp = attention, mlp  # type: ignore[assignment]
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MonePreTrainedModel(Qwen3MoePreTrainedModel):
    """Holds what both classes below share."""

    config: MoneConfig
    config_class = MoneConfig
    _no_split_modules = ["MoneDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MoneRouter, index=0),
        "hidden_states": MoneDecoderLayer,
        # Both kinds: neither is a subclass of the other.
        "attentions": [MoneAttention, MoneLatentAttention],
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (MoneExperts, MoneMLP)) and self.config.mone is not None:
            reset_state(module, NeuronSettings.from_config(self.config.mone).rule)
        if isinstance(module, _OUR_EXPERTS):
            for name, weight in module.named_parameters(recurse=False):
                std, given = self.config.initializer_range, module.gate_weights.get(name)
                if given is not None:
                    std = given.std if given.absolute else given.std * std
                init.normal_(weight, std=std)
        elif isinstance(module, MoneProductKeyExperts):
            for name, weight in module.named_parameters(recurse=False):
                keys = name == "key_weight"
                std = module.sizes.key_std if keys else self.config.initializer_range
                init.normal_(weight, std=std)
        elif isinstance(module, MoneRouter):
            for name, described in module.method_weights.items():
                if described.initial is not None:
                    init.constant_(module.get_parameter(name), described.initial)
                elif name != "weight":
                    init.normal_(module.get_parameter(name), std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class MoneModel(MonePreTrainedModel, Qwen3MoeModel):
    """Is the decoder without the output layer."""

    def __init__(self, config: MoneConfig) -> None:
        # Past the stock constructors, whose modules are replaced.
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MoneDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rotary: nn.Module
        if config.attention_type == "mla":
            rotary = DeepseekV2RotaryEmbedding(config=config)  # type: ignore[arg-type]
        else:
            rotary = Qwen3MoeRotaryEmbedding(config=config)
        self.rotary_emb = rotary  # type: ignore[assignment]
        self.gradient_checkpointing = False
        guard(self, asked_to_select)
        self.post_init()


class MoneForCausalLM(MonePreTrainedModel, Qwen3MoeForCausalLM):
    """Is the language model: the decoder and its output layer."""

    def __init__(self, config: MoneConfig) -> None:
        # Past the stock constructors, whose modules are replaced.
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.model = MoneModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()
