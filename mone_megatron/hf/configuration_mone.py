"""Defines the configuration of an exported model: everything that our training can express.

It extends Qwen3-MoE's, whose names it keeps. This file is copied into exported models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV2Config, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from mone_megatron.methods.router import Router
from mone_megatron.methods.routers import ROUTERS


@strict
class MoneConfig(Qwen3MoeConfig):
    r"""Is a Qwen3-MoE configuration with neuron selection and our model family's choices.

    mone (`dict`, *optional*): neuron selection: keep_ratio, score, apply_to; None for plain MLPs.
    attention_type (`str`): "gqa", or "mla" (multi-latent attention, DeepSeek-V2).
    qk_norm (`str`): RMSNorm of queries and keys: "none", by "head", or over "all_heads" (OLMoE).
    qkv_bias (`bool`): a bias on the query, key and value projections.
    gate (`str`): how routed experts compute gate projections: "full", "low_rank", "split".
    gate_rank (`int`): q of a gate that has one.
    product_key (`dict`, *optional*): experts of one neuron each in place of every MLP, by their
    keys, key_dim, heads and experts_per_head; None for MLPs.
    shared_expert_intermediate_size (`int`): width of the expert every token visits; 0 for none.
    shared_expert_gate (`bool`): a sigmoid gate on it.
    rectified_up (`bool`): up projections of MLPs and experts are max(u, 0) (dReLU).
    router_kind (`str`): how experts are chosen: "topk", "relu", "top_p", "autonomy", ...
    router_settings (`dict`): what a router of that kind reads beside.
    router_score_function (`str`): "softmax" or "sigmoid".
    router_bias (`bool`): a bias on the scores that choose experts (not on their weights).
    router_scaling_factor (`float`): multiplies the routing weights.
    n_group, topk_group (`int`): choose experts within so many of so many groups; 0 for no groups.
    norm_topk_prob (`bool`): softmax over the chosen experts (True) or over all (False).
    kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of "mla".
    """

    model_type = "mone"

    mone: dict | None = None
    attention_type: str = "gqa"
    qk_norm: str = "head"
    qkv_bias: bool = False
    gate: str = "full"
    gate_rank: int = 0
    product_key: dict | None = None
    rectified_up: bool = False
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_kind: str = "topk"
    router_settings: dict | None = None
    router_score_function: str = "softmax"
    router_bias: bool = False
    router_scaling_factor: float = 1.0
    n_group: int = 0
    topk_group: int = 0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    head_dim: int | None = None

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """Returns how transformers' tensor parallelism splits modules, by pattern of their names.

        Attention is split as in the family of transformers that it is taken from, MLPs and
        experts as in Qwen3-MoE.
        """
        source: type[PreTrainedConfig] = Qwen3MoeConfig
        if self.attention_type == "mla":
            source = DeepseekV2Config
        elif self.qk_norm == "all_heads":
            source = OlmoeConfig  # whose norm needs all heads, too
        own, theirs = Qwen3MoeConfig.base_model_tp_plan, source.base_model_tp_plan
        assert own is not None
        assert theirs is not None
        plan = {name: style for name, style in own.items() if ".mlp." in name}
        plan |= {name: style for name, style in theirs.items() if ".self_attn." in name}
        if self.attention_type == "mla":
            # One of them is there.
            plan.pop(f"layers.*.self_attn.q_{'proj' if self.q_lora_rank else 'b_proj'}", None)
        shared = {
            name.replace("mlp.", "mlp.shared_expert."): style
            for name, style in plan.items()
            if ".mlp." in name and "experts" not in name
        }
        if self.gate != "full":
            # Each device computes its experts whole.
            plan = {name: style for name, style in plan.items() if ".experts" not in name}
        if self.product_key is not None:
            # Each device has all its experts.
            plan = {name: style for name, style in plan.items() if ".mlp." not in name}
        return plan | shared if self.shared_expert_intermediate_size else plan

    @property
    def base_model_ep_plan(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Returns how transformers' expert parallelism splits modules, by pattern of their names.

        Experts with another gate than "full", and those that product keys find, are not split.
        """
        split = self.gate == "full" and self.product_key is None
        plan = Qwen3MoeConfig.base_model_ep_plan if split else {}
        assert plan is not None
        return plan

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives the head sizes that transformers' attention classes read.

        A model that selects neurons, whose experts have another gate than "full" or whose router
        gives tokens different numbers of experts also gets the experts implementation ``mone``,
        unless another one was asked for.

        Raises:
            ValueError: product keys stand beside what such a model does not have.
        """
        if self.attention_type == "mla":
            assert self.qk_nope_head_dim is not None
            assert self.qk_rope_head_dim is not None
            # As in DeepseekV2Config: it also tells caches that keys and values differ in size.
            self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
            self.head_dim = self.qk_rope_head_dim
            self.num_key_value_heads = self.num_attention_heads
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        # A model that selects does so whatever the library's default is; who asks for another
        # implementation gets it. Only ours know other gates, and leave out the experts that fill a
        # token's places beyond those it chose.
        ours = self.mone is not None or self.gate != "full" or not self.router.fixed_count
        if ours and self._experts_implementation is None:
            self._experts_implementation = "mone"
        if self.product_key is not None:
            self._refuse_beside_product_key()

    def _refuse_beside_product_key(self) -> None:
        """Refuses what a model whose experts are single neurons does not have.

        Raises:
            ValueError: naming the setting.
        """
        others = {
            "mone": self.mone,
            "num_experts": self.num_experts,
            "rectified_up": self.rectified_up,
        }
        for name, value in others.items():
            if value:
                raise ValueError(
                    f"{name}: {value} beside product_key, whose experts are single neurons in the "
                    "place of every MLP; leave one of the two out"
                )

    @property
    def router(self) -> Router:
        """Returns the method of the router.

        Raises:
            ValueError: the name is unknown.
        """
        return ROUTERS[self.router_kind]
