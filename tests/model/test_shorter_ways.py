"""What layers compute at once on a CPU is what they compute one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models import build, tiny
from torch import Tensor

from mone_megatron.config.schema import MoNEConfig, NeuronBalanceConfig
from mone_megatron.kernels import ops
from mone_megatron.kernels.compiled_cpu import compiled, compiled_products
from mone_megatron.model import self_attention
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS
from mone_megatron.parallel.megatron_compat.auxiliary_losses import (
    forget_layer_losses,
    layer_losses,
)

pytestmark = [
    pytest.mark.skipif(compiled_products() is None, reason=compiled().problem),
    pytest.mark.usefixtures("one_process"),
]

LENGTH = 192
MODELS = {
    "moe": MoNEConfig(enabled=False),
    "mone": MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=0.01)),
    "raw": MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=0.01, normalize=False)),
    "unbalanced": MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=0.0)),
}


def _run(mone: MoNEConfig, train: bool = True) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses of tokens, the balance loss, and gradients by name."""
    config = tiny(mone)
    config = replace(config, train=replace(config.train, seq_length=LENGTH))
    forget_layer_losses()
    model = build(config).train(train)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 500, (2, LENGTH + 1), generator=generator)
    places = torch.arange(LENGTH).expand(2, -1)
    losses = model(tokens[:, :-1], places, None, labels=tokens[:, 1:])
    balance = layer_losses().get(NEURON_BALANCE_LOSS, torch.zeros(1)).clone()
    losses.mean().backward()
    return losses.detach(), balance, {n: p.grad for n, p in model.named_parameters()}


def _counting(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*arguments, **named)

    return counted


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mone", MODELS)
def test_experts_at_once_are_the_same_to_the_last_bit(
    mone: str, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(ops, "through_experts", _counting(calls, "experts", ops.through_experts))
    losses, balance, gradients = _run(MODELS[mone], train)
    assert calls
    monkeypatch.setattr(ops, "through_experts", lambda *arguments: None)
    other_losses, other_balance, expected = _run(MODELS[mone], train)
    assert torch.equal(losses, other_losses)
    assert torch.equal(balance, other_balance)
    assert bool(balance.any()) == (mone in ("mone", "raw") and train)
    for name, gradient in gradients.items():
        # The gradients of a microbatch's rows are added up in the same order, too.
        assert torch.equal(gradient, expected[name]), name


def test_attention_of_projections_is_the_same_up_to_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    at_once = self_attention.attention_of_projections
    monkeypatch.setattr(
        self_attention, "attention_of_projections", _counting(calls, "attention", at_once)
    )
    losses, _, gradients = _run(MODELS["moe"])
    assert calls
    monkeypatch.setattr(self_attention, "makes_heads", lambda *arguments: False)
    other_losses, _, expected = _run(MODELS["moe"])
    torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        atol = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=atol, msg=name)


def _hook(module: Any, seen: list[str]) -> None:
    module.register_forward_hook(lambda *call: seen.append("hook"))


def _see_before(module: Any, seen: list[str]) -> None:
    module.register_forward_pre_hook(lambda *call: seen.append("before"))


def _wrap(module: Any, seen: list[str]) -> None:
    module.forward = _counting(seen, "wrapper", module.forward)


def _override(module: Any, seen: list[str]) -> None:
    kind = type(module)

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append("subclass")
        return kind.forward(self, *arguments, **named)

    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})


@pytest.mark.parametrize("way", [_hook, _see_before, _wrap, _override])
@pytest.mark.parametrize(
    "place", ["core_attention", "q_layernorm", "k_layernorm", "experts", "neuron_gate", "selector"]
)
def test_who_is_watched_or_changed_is_called(
    place: str, way: Callable[[Any, list[str]], None]
) -> None:
    config = tiny(MODELS["mone"])
    config = replace(config, train=replace(config.train, seq_length=LENGTH))
    model = build(config).train()
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(place):
            way(module, seen)
    tokens = torch.randint(0, 500, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    model(tokens, torch.arange(LENGTH).expand(1, -1), None, labels=tokens)
    assert seen
