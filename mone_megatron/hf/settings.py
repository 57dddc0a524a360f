"""Turns our model settings into a Hugging Face configuration, and back.

Reading refuses what our model cannot compute, by the key of their configuration, instead of
leaving it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from mone_megatron.config.product_key import ProductKeyConfig
from mone_megatron.config.schema import (
    MLAConfig,
    ModelConfig,
    MoNEConfig,
    RopeScalingConfig,
    RouterConfig,
)
from mone_megatron.hf.architectures import MONE, Architecture, architecture_of
from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.experts_mone import NeuronSettings
from mone_megatron.hf.origin import Origin
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.routers import ROUTERS

# Also how transformers spells them.
_SAME_ACTIVATION = {"swish": "silu"}
# The epsilon of DeepSeek-V2's latent norms, which no configuration of theirs reaches.
_LATENT_EPS = 1e-6


@dataclass(frozen=True)
class ImportedSettings:
    """Holds what a Hugging Face configuration says, in our terms."""

    architecture: Architecture
    model: ModelConfig
    # None for a model that does not select.
    mone: MoNEConfig | None
    vocab_size: int
    max_positions: int
    # That config.json names, as torch spells it; None when it names none.
    dtype: str | None


def to_hf_config(
    model: ModelConfig,
    mone: MoNEConfig,
    *,
    architecture: Architecture,
    vocab_size: int,
    max_positions: int,
    dtype: str,
    token_ids: dict[str, Any],
    origin: Origin | None = None,
) -> PreTrainedConfig:
    """Returns the configuration of an exported model.

    What training does not change, and what our settings do not say, is as in the model that was
    imported, if one was. Its ``max_position_embeddings`` is the larger of that model's and
    ``max_positions`` while RoPE is the same, since training on short sequences takes no positions
    away; else it is ``max_positions``.

    Args:
        model: ours.
        mone: ours, with the keep ratio that the weights are to be used with.
        architecture: from :func:`~mone_megatron.hf.architectures.choose`.
        vocab_size: true size.
        max_positions: the longest sequence it was trained on.
        dtype: of the weights, as torch names it.
        token_ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; None for none.
        origin: of the model that was imported; None when none was.

    Raises:
        ValueError: transformers has no such activation.
    """
    if hidden_act(model.activation) not in ACT2FN:
        raise ValueError(
            f"model.activation: transformers has no {model.activation}; a model with it cannot be "
            "exported"
        )
    settings = _settings(model, mone, architecture, vocab_size)
    if origin is not None:
        imported = from_hf_config(origin.standard_config(), "the imported model")
        then = None
        if origin.model_type == architecture.model_type:
            then = _settings(
                imported.model, imported.mone or MoNEConfig(), architecture, vocab_size
            )
        known = frozenset(AutoConfig.for_model(architecture.model_type).to_dict())
        settings = origin.merged(settings, then, known)
        if _rope_parameters(imported.model) == _rope_parameters(model):
            max_positions = max(max_positions, imported.max_positions)
    settings |= {
        "architectures": [architecture.class_name],
        "dtype": dtype,
        "max_position_embeddings": max_positions,
        **token_ids,
    }
    if architecture is MONE:
        return MoneConfig(**settings)
    return AutoConfig.for_model(architecture.model_type, **settings)


def hidden_act(activation: str) -> str:
    """Returns transformers' name of an activation, or of its gate beside ``rectified_up``."""
    return ACTIVATIONS[activation].rectified_gate or activation


def activation_of(values: Mapping[str, Any]) -> str:
    """Returns our name of the activation of a model of transformers; see :func:`hidden_act`."""
    name: str = _SAME_ACTIVATION.get(values["hidden_act"], values["hidden_act"])
    if not values.get("rectified_up"):
        return name
    found = [known.name for known in ACTIVATIONS if known.rectified_gate == name]
    return found[0] if found else f"rectified {name}"


def _settings(
    model: ModelConfig, mone: MoNEConfig, architecture: Architecture, vocab_size: int
) -> dict[str, Any]:
    """Returns what our settings say in the words of an architecture."""
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": hidden_act(model.activation),
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
    }
    if model.attention == "gqa":
        settings["head_dim"] = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.num_experts:
        settings |= _expert_settings(model, architecture)
    if architecture.model_type == "qwen2_moe":
        settings["qkv_bias"] = model.qkv_bias
    if architecture.model_type in ("mixtral", "mistral"):
        settings["sliding_window"] = None
    if architecture is MONE:
        settings |= _mone_settings(model, mone)
    return settings


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling.type == "none":
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    if scaling.mscale:
        parameters |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return parameters


def _latent_settings(model: ModelConfig) -> dict[str, Any]:
    mla = model.mla
    return {
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank or None,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
    }


def _expert_settings(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    kind, router = architecture.model_type, model.router
    settings: dict[str, Any] = {
        "num_experts_per_tok": model.experts_per_token,
        "router_aux_loss_coef": sum(router.balance_coeff),
    }
    if kind in ("mixtral", "olmoe"):
        # Every layer has experts, and their width is called that of the MLP.
        settings["intermediate_size"] = model.expert_ffn_hidden_size
        settings["num_local_experts" if kind == "mixtral" else "num_experts"] = model.num_experts
        if kind == "olmoe":
            settings["norm_topk_prob"] = not router.pre_softmax
        return settings
    settings["moe_intermediate_size"] = model.expert_ffn_hidden_size
    if kind == "deepseek_v2":
        shared = model.shared_expert_ffn_hidden_size // model.expert_ffn_hidden_size
        return (
            settings
            | _latent_settings(model)
            | {
                "n_routed_experts": model.num_experts,
                "n_shared_experts": shared,
                "first_k_dense_replace": model.first_dense_layers,
                "routed_scaling_factor": router.scaling_factor or 1.0,
                "topk_method": "greedy",
                "norm_topk_prob": False,
            }
        )
    settings |= {
        "num_experts": model.num_experts,
        "norm_topk_prob": not router.pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.first_dense_layers)),
    }
    if kind == "qwen2_moe":
        settings["shared_expert_intermediate_size"] = model.shared_expert_ffn_hidden_size
    return settings


def _mone_settings(model: ModelConfig, mone: MoNEConfig) -> dict[str, Any]:
    router = model.router
    settings: dict[str, Any] = {
        "attention_type": model.attention,
        "qk_norm": model.qk_norm_scope if model.qk_norm else "none",
        "qkv_bias": model.qkv_bias,
        "rectified_up": bool(ACTIVATIONS[model.activation].rectified_gate),
        "num_experts": model.num_experts,
        "product_key": asdict(model.product_key) if model.experts == "product_key" else None,
        "gate": model.gate,
        "gate_rank": model.gate_size.rank if GATES[model.gate].ranked else 0,
        "shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size,
        "shared_expert_gate": model.shared_expert_gate,
        **_router_settings(model),
        "router_score_function": router.score_function,
        "router_bias": router.expert_bias,
        "router_scaling_factor": router.scaling_factor or 1.0,
        "n_group": router.num_groups,
        "topk_group": router.group_topk,
    }
    if model.attention == "mla":
        settings |= _latent_settings(model)
    if mone.enabled:
        chosen = NeuronSettings(
            mone.keep_ratio, mone.score, tuple(mone.apply_to), mone.rule, dict(mone.rule_options)
        )
        settings["mone"] = chosen.to_config()
    return settings


def _router_settings(model: ModelConfig) -> dict[str, Any]:
    """Returns the router's kind, and what it reads; nothing of megatron-core's own."""
    router = ROUTERS[model.router.kind]
    if router.stock or not model.num_experts:
        return {}
    read = asdict(model.router_settings.options)
    return {"router_kind": router.name, "router_settings": read or None}


def from_hf_config(config: PreTrainedConfig, where: str) -> ImportedSettings:
    """Returns our settings of a Hugging Face model.

    Args:
        config: loaded by transformers, so that defaults are filled in.
        where: for messages.

    Raises:
        ValueError: an architecture or a setting that our model cannot compute; each problem is a
            line that names their key.
    """
    architecture = architecture_of(config.model_type, where)
    values = config.to_dict()
    problems = [f"{where}: {problem}" for problem in _unsupported(architecture, values)]
    if problems:
        raise ValueError("\n".join(problems))
    mone = None
    if values.get("mone"):
        chosen = NeuronSettings.from_config(values["mone"])
        mone = MoNEConfig(
            enabled=True,
            keep_ratio=chosen.keep_ratio,
            score=chosen.score,
            apply_to=chosen.apply_to,  # type: ignore[arg-type]
            rule=chosen.rule,
            rule_options=chosen.rule_options,
        )
    return ImportedSettings(
        architecture=architecture,
        model=_model(architecture, values),
        mone=mone,
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        dtype=values.get("dtype"),
    )


def _unsupported(architecture: Architecture, values: dict[str, Any]) -> Iterator[str]:
    kind = architecture.model_type
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method", "of a kind that it does not name")
        yield (
            f"quantization_config: weights quantised by {method} are not read; convert the model to"
            " bfloat16 first"
        )
    if (activation := activation_of(values)) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS.names)
        yield f"hidden_act={activation!r} is not supported; supported are {known}"
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            yield f"{key}=true is not supported: output projections have no bias here"
    if values.get("clip_qkv") is not None:
        yield f"clip_qkv={values['clip_qkv']} is not supported"
    window = values.get("sliding_window")
    if window is not None and values.get("use_sliding_window", True):
        yield f"sliding_window={window} is not supported; set it to null if sequences are shorter"
    latent = kind == "deepseek_v2" or values.get("attention_type") == "mla"
    rope = values["rope_parameters"]["rope_type"]
    if rope != "default" and not (latent and rope == "yarn"):
        yield f"rope_parameters.rope_type={rope!r} is not supported with this attention"
    if values.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        yield "partial_rotary_factor other than 1 is not supported"
    if _weight_is_always_1(kind, values):
        yield (
            "num_experts_per_tok=1 with weights that sum to 1 (norm_topk_prob) is not supported: "
            "routers would get no gradient"
        )
    if values.get("decoder_sparse_step", 1) != 1:
        yield f"decoder_sparse_step={values['decoder_sparse_step']} is not supported; only 1 is"
    dense = values.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))):
        yield f"mlp_only_layers={dense}: dense layers must be the first ones"
    if kind == "deepseek_v2":
        if values["rms_norm_eps"] != _LATENT_EPS:
            yield f"rms_norm_eps={values['rms_norm_eps']}: only {_LATENT_EPS} is supported"
        grouped = values["topk_method"] != "greedy"
        # Groups are ranked by their best expert there, and by the sum of as many as are chosen of
        # a group here: the same when that is one.
        if grouped and values["num_experts_per_tok"] != values["topk_group"]:
            yield (
                f"topk_method={values['topk_method']!r} with num_experts_per_tok="
                f"{values['num_experts_per_tok']} and topk_group={values['topk_group']} ranks "
                "groups in a way that is not supported; only greedy is"
            )


def _weight_is_always_1(kind: str, values: dict[str, Any]) -> bool:
    """Returns whether the one expert of a token has the weight 1, whatever its score."""
    if ROUTERS[values.get("router_kind", "topk")].own_weights:
        return False
    softmax = values.get("router_score_function", "softmax") == "softmax"
    normalized = kind == "mixtral" or values.get("norm_topk_prob", False)
    return softmax and normalized and values.get("num_experts_per_tok") == 1


def _model(architecture: Architecture, values: dict[str, Any]) -> ModelConfig:
    kind = architecture.model_type
    latent = kind == "deepseek_v2" or values.get("attention_type") == "mla"
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim") or hidden // heads
    norm = {"qwen3_moe": "head", "qwen3": "head", "olmoe": "all_heads"}.get(kind, "none")
    norm = values.get("qk_norm", norm)
    shared: dict[str, Any] = {}
    if kind == "deepseek_v2":
        shared["shared_expert_ffn_hidden_size"] = (
            values["n_shared_experts"] * values["moe_intermediate_size"]
        )
    elif width := values.get("shared_expert_intermediate_size", 0):
        shared["shared_expert_ffn_hidden_size"] = width
        shared["shared_expert_gate"] = values.get("shared_expert_gate", kind == "qwen2_moe")
    mla: dict[str, Any] = {}
    if latent:
        mla["mla"] = MLAConfig(
            q_lora_rank=values["q_lora_rank"] or 0,
            kv_lora_rank=values["kv_lora_rank"],
            qk_nope_head_dim=values["qk_nope_head_dim"],
            qk_rope_head_dim=values["qk_rope_head_dim"],
            v_head_dim=values["v_head_dim"],
        )
    dense_only = "all" in architecture.allows.get("dense_layers", ()) and kind != "mone"
    experts: dict[str, Any] = {"num_experts": 0}
    if not dense_only and (count := _number_of_experts(values)):
        experts = {
            "num_experts": count,
            "experts_per_token": values["num_experts_per_tok"],
            "expert_ffn_hidden_size": values.get(
                "moe_intermediate_size", values["intermediate_size"]
            ),
            "first_dense_layers": values.get("first_k_dense_replace")
            or len(values.get("mlp_only_layers") or []),
            "router": _router(kind, values),
            "gate": values.get("gate", "full"),
            "gate_rank": values.get("gate_rank", 0),
            **shared,
        }
    if values.get("product_key"):
        experts |= {
            "experts": "product_key",
            "product_key": ProductKeyConfig(**values["product_key"]),
        }
    return ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads if latent else values["num_key_value_heads"],
        head_dim=0 if latent or head_dim * heads == hidden else head_dim,
        attention="mla" if latent else "gqa",
        **mla,
        dense_ffn_hidden_size=values["intermediate_size"],
        **experts,
        vocab_size=values["vocab_size"],
        tie_embeddings=values["tie_word_embeddings"],
        activation=activation_of(values),
        qk_norm=norm != "none",
        qk_norm_scope="all_heads" if norm == "all_heads" else "head",
        qkv_bias=values.get("qkv_bias", kind == "qwen2"),
        norm_eps=values["rms_norm_eps"],
        rope_theta=values["rope_parameters"]["rope_theta"],
        rope_scaling=_rope_scaling(values["rope_parameters"]),
        init_std=values["initializer_range"],
        attention_dropout=values.get("attention_dropout", 0.0),
    )


def _number_of_experts(values: dict[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next(values[name] for name in names if name in values)


def _router(kind: str, values: dict[str, Any]) -> RouterConfig:
    always_normalized = kind == "mixtral"
    scaling = values.get("routed_scaling_factor", values.get("router_scaling_factor", 1.0))
    grouped = values.get("topk_method", "greedy") != "greedy" or kind == "mone"
    method = ROUTERS[values.get("router_kind", "topk")]
    balance: dict[str, Any] = {"balance_coeff": (values.get("router_aux_loss_coef", 0.01),)}
    if method.loss is not None:
        # It brings its own.
        balance = {"balance": ("none",), "balance_coeff": (0.0,)}
    return RouterConfig(
        kind=method.name,
        options=values.get("router_settings") or {},
        **balance,
        score_function=values.get("router_score_function", "softmax"),
        pre_softmax=not (always_normalized or values.get("norm_topk_prob", False)),
        expert_bias=values.get("router_bias", False),
        scaling_factor=0.0 if scaling == 1.0 else scaling,
        num_groups=(values.get("n_group") or 0) if grouped else 0,
        group_topk=(values.get("topk_group") or 0) if grouped else 0,
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScalingConfig:
    if rope["rope_type"] == "default":
        return RopeScalingConfig()
    return RopeScalingConfig(
        type="yarn",
        factor=rope["factor"],
        original_max_position=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )
