"""Tells which Hugging Face architectures hold which of our models, and how weights are named.

It is a table: each architecture says what it allows beyond a plain GQA decoder, and how its weights
are named. :func:`choose` finds the stock one that holds a model; what none of them holds, and every
MoNE, is exported as our own class (:mod:`.modeling_mone`), which holds all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mone_megatron.config.schema import ModelConfig
from mone_megatron.methods.activations import ACTIVATIONS


@dataclass(frozen=True)
class ExpertNames:
    """Tells where the routed experts' weights are, under ``model.layers.N.``."""

    # "split": three matrices an expert, as checkpoints on the Hub have them and other programs
    # read them; "fused": all experts in two tensors, as transformers holds them; "copies": one
    # dense MLP that each expert is a copy of.
    kind: Literal["split", "fused", "copies"]
    # The MoE block, and in "split" an expert's gate, up and down projections.
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


FUSED = ExpertNames("fused")
COPIES = ExpertNames("copies")


@dataclass(frozen=True)
class Architecture:
    """Describes one Hugging Face model type."""

    model_type: str
    class_name: str
    # What it allows of each of :func:`features`, where that is more or other than PLAIN.
    allows: Mapping[str, tuple[Any, ...]]
    experts: ExpertNames = field(default_factory=lambda: ExpertNames("split"))
    # The shared expert, under ``model.layers.N.mlp.``.
    shared: str = "shared_expert"

    def lacks(self, model: ModelConfig, *, mone: bool) -> list[str]:
        """Returns what of a model this architecture cannot hold, as ``feature=value``."""
        return [
            f"{name}={value}"
            for name, value in features(model, mone=mone).items()
            if value not in self.allows.get(name, PLAIN[name])
        ]


def features(model: ModelConfig, *, mone: bool) -> dict[str, Any]:
    """Returns by name the features of one of our models in which architectures differ."""
    has_experts = model.num_experts > 0
    dense = {0: "none", model.num_layers: "all"}.get(model.first_dense_layers, "first")
    shared = "gated" if model.shared_expert_gate else "plain"
    router = model.router
    return {
        "mone": mone,
        "experts": model.experts,
        "gate": model.gate if has_experts else "full",
        "rectified_up": bool(ACTIVATIONS[model.activation].rectified_gate),
        "attention": model.attention,
        "qk_norm": model.qk_norm_scope if model.qk_norm else "none",
        "qkv_bias": model.qkv_bias,
        "own_head_dim": model.head_dim * model.num_attention_heads not in (0, model.hidden_size),
        "rope": model.rope_scaling.type,
        # Multi-latent attention's own norms have an epsilon that no configuration reaches.
        "latent_eps": model.norm_eps if model.attention == "mla" else 1e-6,
        "dense_layers": dense if has_experts else "all",
        "shared": shared if has_experts and model.shared_expert_ffn_hidden_size else "none",
        # DeepSeek-V2 counts shared experts of the routed experts' width.
        "shared_multiple": shared == "plain"
        and model.shared_expert_ffn_hidden_size % max(model.expert_ffn_hidden_size, 1) == 0,
        "router": router.kind if has_experts else "topk",
        "scores": router.score_function if has_experts else "softmax",
        "normalized": not router.pre_softmax,
        "expert_bias": has_experts and router.expert_bias,
        "groups": has_experts and router.group_topk > 0,
        "scaled": has_experts and router.scaling_factor not in (0.0, 1.0),
    }


# A GQA decoder whose layers all have routed experts, weighted by a softmax over the chosen ones.
PLAIN: dict[str, tuple[Any, ...]] = {
    "mone": (False,),
    "experts": ("grouped",),
    "gate": ("full",),
    "rectified_up": (False,),
    "attention": ("gqa",),
    "qk_norm": ("none",),
    "qkv_bias": (False,),
    "own_head_dim": (False,),
    "rope": ("none",),
    "latent_eps": (1e-6,),
    "dense_layers": ("none",),
    "shared": ("none",),
    "shared_multiple": (True, False),
    "router": ("topk",),
    "scores": ("softmax",),
    "normalized": (True,),
    "expert_bias": (False,),
    "groups": (False,),
    "scaled": (False,),
}

_ANY = (True, False)
_LEADING = ("none", "first")
_DENSE = {"dense_layers": ("all",), "normalized": _ANY}


class _Anything(tuple):
    """Holds every value."""

    def __contains__(self, value: object) -> bool:
        return True


MONE = Architecture("mone", "MoneForCausalLM", dict.fromkeys(PLAIN, _Anything()), experts=FUSED)
_MIXTRAL = ExpertNames("split", "block_sparse_moe", ("w1", "w3", "w2"))
STOCK: tuple[Architecture, ...] = (
    Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "qk_norm": ("head",),
            "own_head_dim": _ANY,
            "dense_layers": _LEADING,
            "normalized": _ANY,
        },
    ),
    Architecture("mixtral", "MixtralForCausalLM", {"own_head_dim": _ANY}, experts=_MIXTRAL),
    Architecture("olmoe", "OlmoeForCausalLM", {"qk_norm": ("all_heads",), "normalized": _ANY}),
    Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            "qkv_bias": _ANY,
            "dense_layers": _LEADING,
            "shared": ("gated",),
            "normalized": _ANY,
        },
    ),
    Architecture(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            "attention": ("mla",),
            "rope": ("none", "yarn"),
            "dense_layers": _LEADING,
            "shared": ("plain",),
            "shared_multiple": (True,),
            "normalized": (False,),
            "scaled": _ANY,
        },
        shared="shared_experts",
    ),
    Architecture(
        "qwen3", "Qwen3ForCausalLM", _DENSE | {"qk_norm": ("head",), "own_head_dim": _ANY}
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", _DENSE | {"qkv_bias": (True,)}),
    Architecture("llama", "LlamaForCausalLM", _DENSE | {"own_head_dim": _ANY}),
    Architecture("mistral", "MistralForCausalLM", _DENSE | {"own_head_dim": _ANY}),
)
BY_TYPE: dict[str, Architecture] = {one.model_type: one for one in (*STOCK, MONE)}


def choose(model: ModelConfig, *, mone: bool) -> Architecture:
    """Returns what to export a model as: the first stock architecture that holds it, or ours."""
    return next((one for one in STOCK if not one.lacks(model, mone=mone)), MONE)


def architecture_of(model_type: str, where: str) -> Architecture:
    """Returns the architecture of a model that is to be imported; ``where`` names it in errors.

    Raises:
        ValueError: it is none that we import.
    """
    if model_type not in BY_TYPE:
        raise ValueError(
            f"{where}: architecture {model_type!r} is not supported; supported are "
            f"{', '.join(BY_TYPE)}"
        )
    return BY_TYPE[model_type]
