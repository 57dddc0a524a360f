"""What a run says of chosen methods before its first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mone_megatron.config.load import compose
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.train.introduction import kept_weights, not_causal


@pytest.fixture(autouse=True)
def methods_that_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (RULES, ROUTERS):
        usual = registry["topk"]
        method = replace(usual, name="looks_ahead", causal=False)  # type: ignore[type-var]
        monkeypatch.setitem(registry._methods, "looks_ahead", method)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("experiment=tiny_mone",), []),
        (("experiment=tiny_mone", "mone.rule=looks_ahead"), ["mone.rule=looks_ahead"]),
        (
            ("experiment=tiny_moe", "model.router.kind=looks_ahead"),
            ["model.router.kind=looks_ahead"],
        ),
        (
            ("experiment=tiny_mone", "mone.rule=looks_ahead", "model.router.kind=looks_ahead"),
            ["mone.rule=looks_ahead", "model.router.kind=looks_ahead"],
        ),
        # What is not used does not matter.
        (("experiment=tiny_moe", "mone.rule=looks_ahead"), []),
        (("experiment=tiny_moe", "model.num_experts=0", "model.router.kind=looks_ahead"), []),
    ],
)
def test_what_is_not_causal_is_told(overrides: tuple[str, ...], told: list[str]) -> None:
    lines = list(not_causal(compose(list(overrides))))
    assert [line.split(" ", 1)[0] for line in lines] == told
    assert all("is not causal" in line for line in lines)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("train.seq_length=256",), True),
        (("train.seq_length=64",), False),
        (("train.seq_length=1024",), False),
        (("train.seq_length=256", "parallel.context=2"), False),
        (("train.seq_length=256", "model.attention_window=16"), False),
        (
            ("train.seq_length=256", "model.attention_window=16", "model.full_attention_every=2"),
            True,
        ),
    ],
)
def test_attention_that_keeps_its_weights_is_told(overrides: tuple[str, ...], told: bool) -> None:
    config = compose(("experiment=tiny_moe", *overrides))
    lines = list(kept_weights(config, "cpu", torch.float32))
    assert [line.split(" for ")[0] for line in lines] == ["attention keeps its weights"] * told
    assert not list(kept_weights(config, "cpu", torch.bfloat16))
    assert not list(kept_weights(config, "cuda", torch.float32))
