"""Models that transformers cannot compute are refused by the key that makes them so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mone_megatron.config.load import compose
from mone_megatron.hf.export import choose_architecture
from mone_megatron.hf.source import Source


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.attention_window=4", "model.attention_window: 4 is not known"),
        ("model.attention_sink=zero", "model.attention_sink: zero is not known"),
        ("model.attention_sink=learnable", "model.attention_sink: learnable is not known"),
        ("megatron.transformer.attention_output_gate=true",
         "megatron.transformer.attention_output_gate: it may change what the model computes"),
    ],
)  # fmt: skip
def test_it_is_refused_by_its_key(override: str, says: str) -> None:
    config = compose(["experiment=tiny_mone", override])
    source: Any = SimpleNamespace(config=config, model=config.model, mone=config.mone)
    with pytest.raises(ValueError, match=says) as caught:
        choose_architecture(cast("Source", source), "auto")
    assert "such models cannot be exported" in str(caught.value)


@pytest.mark.parametrize(
    "override", ["megatron.transformer.moe_permute_fusion=true", "data.reset_attention=true"]
)
def test_what_changes_no_model_is_exported(override: str) -> None:
    config = compose(["experiment=tiny_mone", override])
    assert config.megatron.changing() == []
