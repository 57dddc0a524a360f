"""The shorter way of megatron-core's router says what megatron-core's own way says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import compiled
from mone_megatron.mone import topk_router
from mone_megatron.mone.topk_router import ShorterTopKRouter
from mone_megatron.parallel.megatron_compat.auxiliary_losses import (
    forget_layer_losses,
    layer_losses,
)

pytestmark = [
    pytest.mark.skipif(compiled().library is None, reason=compiled().problem),
    pytest.mark.usefixtures("one_process"),
]

HIDDEN, EXPERTS = 6, 8
LOSSES = {"moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}


class Routed(dict[str, Tensor]):
    """What a router returned and did, by name."""


def routed(kind: type[TopKRouter], settings: dict[str, Any], train: bool = True) -> Routed:
    alone = dist.new_group([0])
    config = TransformerConfig(
        **{
            "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 1,
            "num_moe_experts": EXPERTS, "moe_router_topk": 2, "add_bias_linear": False,
            "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32", "cuda_graph_scope": [],
        } | settings
    )  # fmt: skip
    groups = SimpleNamespace(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone)
    router = kind(config, pg_collection=groups).train(train)
    router.layer_number = 2
    draw = torch.Generator().manual_seed(6)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=draw))
    tokens = torch.randn(7, 3, HIDDEN, generator=draw).requires_grad_()
    forget_layer_losses()
    weights_NA, chosen_NA = router(tokens)
    (weights_NA * torch.randn(21, EXPERTS, generator=draw)).sum().backward()
    assert tokens.grad is not None
    assert router.weight.grad is not None
    return Routed(
        weights=weights_NA.detach(), chosen=chosen_NA, grad=tokens.grad,
        grad_weight=router.weight.grad,
        **{name: values.clone() for name, values in layer_losses().items()},
    )  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        LOSSES,
        {**LOSSES, "calculate_per_token_loss": True},
        {**LOSSES, "moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_pre_softmax": True, "moe_router_topk": 1},
        {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.2},
        {**LOSSES, "moe_router_dtype": None, "moe_router_topk": 8},
    ],
    ids=["plain", "losses", "by token", "of all", "one expert", "z-loss alone", "all experts"],
)
def test_it_is_megatron_cores_routing(
    settings: dict[str, Any], train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    at_once = topk_router.route
    monkeypatch.setattr(
        topk_router, "route", lambda *given: (calls.append(given), at_once(*given))[1]
    )
    found = routed(ShorterTopKRouter, settings, train)
    assert calls
    expected = routed(TopKRouter, settings, train)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.1]},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_router_dtype": "fp64"},
    ],
    ids=lambda settings: ", ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_what_it_does_not_know_goes_megatron_cores_way(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> Any:
        raise AssertionError(given)

    monkeypatch.setattr(topk_router, "route", never)
    found, expected = (routed(kind, settings) for kind in (ShorterTopKRouter, TopKRouter))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_mask_of_padding_goes_megatron_cores_way(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(TopKRouter, "routing", lambda self, *some, **named: given.append(named))
    router = ShorterTopKRouter.__new__(ShorterTopKRouter)
    mask = torch.zeros(7, 3, dtype=torch.bool)
    router.routing(torch.zeros(7, 3, EXPERTS), padding_mask=mask)
    assert given == [{"padding_mask": mask}]
