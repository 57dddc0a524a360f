"""What a module of ours leaves out of megatron-core's configuration, its constructor refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from mone_megatron.model.attention import SDPAttention
from mone_megatron.model.norm import AllHeadsRMSNorm, RMSNorm
from mone_megatron.mone import megatron_settings
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.mlp import NeuronMLP, NeuronSharedExpert

# Module -> how it is built of a configuration, and the settings that it computes one value of.
_BUILD: dict[str, tuple[Callable[[TransformerConfig], object], dict[str, Any]]] = {
    "GroupedExperts": (
        lambda config: GroupedExperts(2, config, ProcessGroupCollection.use_mpu_process_groups()),
        megatron_settings.ROUTED_EXPERTS,
    ),
    # Refused before they look at anything else.
    "NeuronMLP": (
        lambda config: NeuronMLP(config, None, None),  # type: ignore[arg-type]
        megatron_settings.GATED_MLP,
    ),
    "NeuronSharedExpert": (
        lambda config: NeuronSharedExpert(config, None, False, None),  # type: ignore[arg-type]
        megatron_settings.SHARED_EXPERT,
    ),
    "SDPAttention": (
        lambda config: SDPAttention(config, 1, AttnMaskType.causal, "self"),
        megatron_settings.CORE_ATTENTION,
    ),
    "RMSNorm": (lambda config: RMSNorm(config, 8), megatron_settings.NORM),
    "AllHeadsRMSNorm": (
        lambda config: AllHeadsRMSNorm(config, 4, num_heads=2),
        megatron_settings.NORM,
    ),
}


def make_config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=2,
        moe_ffn_hidden_size=16,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
    )


def cases() -> Iterator[tuple[str, str]]:
    for module, (_, computed) in _BUILD.items():
        for field in computed:
            yield module, field


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("module", "field"), cases())
def test_a_setting_that_is_not_read_is_refused(module: str, field: str) -> None:
    build, computed = _BUILD[module]
    config = make_config()
    if field not in vars(config):
        pytest.skip(f"this megatron-core has no {field}")
    other = {False: True, True: False, None: 7}.get(computed[field], "another")
    setattr(config, field, other)
    with pytest.raises(ValueError, match=rf"{module} does not compute {field}="):
        build(config)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("module", ["GroupedExperts", "SDPAttention", "RMSNorm", "AllHeadsRMSNorm"])
def test_what_it_computes_is_built(module: str) -> None:
    build, computed = _BUILD[module]
    config = make_config()
    held = {field: vars(config)[field] for field in computed if field in vars(config)}
    assert len(held) > len(computed) / 2
    assert all(value == computed[field] for field, value in held.items())
    build(config)
