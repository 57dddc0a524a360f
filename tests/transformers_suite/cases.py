"""Models for transformers' common tests: ours, each with the stock class that it is measured by."""

from __future__ import annotations

import unittest
from typing import Any

import common_tests
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from mone_megatron.hf import MoneConfig, MoneForCausalLM, MoneModel

# By these names of classes their tests know what a model computes.
MODEL_MAPPING_NAMES[MoneConfig.model_type] = MoneModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoneConfig.model_type] = MoneForCausalLM.__name__

ModelTesterMixin = common_tests.load().ModelTesterMixin

_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3_MOE = _SIZES | {"num_experts": 4, "norm_topk_prob": True}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_DEEPSEEK = (
    {name: value for name, value in _SIZES.items() if name != "head_dim"}
    | _LATENT
    | {"n_routed_experts": 4, "n_group": None, "topk_group": None, "first_k_dense_replace": 0}
)
_OURS = _QWEN3_MOE | {"mone": {"keep_ratio": 0.25}}


class ModelTester:
    """What the common tests ask about a model: its configuration and inputs."""

    batch_size, seq_length, is_training = 4, 7, True

    def __init__(self, config_class: type[PreTrainedConfig], settings: dict[str, Any]) -> None:
        self._config_class, self._settings = config_class, settings

    def __getattr__(self, name: str) -> Any:
        """The sizes."""
        if name.startswith("_") or name not in self._settings:
            raise AttributeError(name)
        return self._settings[name]

    def get_config(self) -> PreTrainedConfig:
        return self._config_class(**self._settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        size = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self._settings["vocab_size"], size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Case(ModelTesterMixin, unittest.TestCase):
    """The common tests of one model."""

    config_class: type[PreTrainedConfig]
    settings: dict[str, Any]
    all_model_classes: tuple[type[PreTrainedModel], ...]
    # They ask it of files with a copyright of a later year only.
    test_can_init_all_missing_weights_before_2023 = True
    # Whose results ours are compared with.
    parent_case: type[Case] | None = None

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.config_class, self.settings)


class Qwen3Moe(Case):
    """The class that ours extends."""

    config_class, settings = Qwen3MoeConfig, _QWEN3_MOE
    all_model_classes = (Qwen3MoeModel, Qwen3MoeForCausalLM)


class DeepseekV2(Case):
    """The class whose attention ours has as multi-latent attention."""

    config_class, settings = DeepseekV2Config, _DEEPSEEK
    all_model_classes = (DeepseekV2Model, DeepseekV2ForCausalLM)


class Ours(Case):
    """The exported class."""

    config_class, settings = MoneConfig, _OURS
    all_model_classes = (MoneModel, MoneForCausalLM)
    parent_case = Qwen3Moe


class Everything(Ours):
    """Every option beside its attention."""

    settings = _OURS | {
        "qk_norm": "all_heads",
        "qkv_bias": True,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gate": True,
        "router_score_function": "sigmoid",
        "router_bias": True,
        "router_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
        "mlp_only_layers": [0],
        "hidden_act": "relu2",
        "mone": {"keep_ratio": 0.25, "apply_to": ["routed", "shared", "dense"]},
    }


class Latent(Ours):
    """Multi-latent attention."""

    settings = _OURS | _LATENT | {"attention_type": "mla"}
    parent_case = DeepseekV2
