"""What each router of ours chooses, against brute force; causality as it is declared."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from test_each_rule import problems
from torch import Tensor

from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.modeling_mone import MoneRouter
from mone_megatron.methods.router import RoutedWeights, Router, RouterSettings
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.routers.expert_choice import expert_choice
from mone_megatron.methods.routers.relu import relu
from mone_megatron.methods.routers.sigmoid_topk import largest_sigmoids
from mone_megatron.methods.routers.top_p import top_p
from mone_megatron.testing.launch import run_layouts

TOKENS, EXPERTS = 24, 8
UNBALANCED = ("model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
# A layer's, of the functions; routers take k = 2 experts.
SETTINGS = RouterSettings(EXPERTS, 16, 2, rank=3, top_p=0.5, threshold=0.5)
ASSIGNING = [router for router in ROUTERS if router.assign is not None]


def logits(*, ties: bool = False) -> Tensor:
    drawn = 2 * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    return drawn.round() if ties else drawn


@pytest.mark.parametrize(("per_token", "count"), [(1, 3), (2, 6), (8, 24)])
def test_each_expert_takes_the_tokens_that_it_weighs_most(per_token: int, count: int) -> None:
    weights = expert_choice(logits(), per_token)
    scores = logits().softmax(dim=-1)
    for expert in range(EXPERTS):
        column = scores[:, expert].tolist()
        best = sorted(range(TOKENS), key=lambda token: (-column[token], token))[:count]
        assert weights[:, expert].nonzero().flatten().tolist() == sorted(best)
        assert torch.equal(weights[best, expert], scores[best, expert])


@pytest.mark.parametrize("p", [0.01, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_top_p_takes_the_fewest_experts_that_hold_the_share(p: float, ties: bool) -> None:
    weights = top_p(logits(ties=ties), p)
    for token, scores in enumerate(logits(ties=ties).softmax(dim=-1).tolist()):
        order = sorted(range(EXPERTS), key=lambda expert: (-scores[expert], expert))
        taken, held = [], 0.0
        for expert in order:
            if held >= p - 1e-7:
                break
            taken.append(expert)
            held += scores[expert]
        assert weights[token].nonzero().flatten().tolist() == sorted(taken)


@pytest.mark.parametrize("router", ASSIGNING, ids=lambda router: router.name)
def test_a_causal_router_looks_at_no_later_token(router: Router) -> None:
    assert router.assign is not None
    changed = logits()
    changed[TOKENS // 2 :] *= 3
    before = router.assign(logits(), SETTINGS)[: TOKENS // 2]
    after = router.assign(changed, SETTINGS)[: TOKENS // 2]
    assert torch.equal(before, after) == router.causal


@pytest.mark.parametrize("router", ASSIGNING, ids=lambda router: router.name)
def test_a_router_assigns_as_it_says(router: Router) -> None:
    assert router.assign is not None
    for given in (logits(), logits(ties=True), logits().bfloat16()):
        weights = router.assign(given, SETTINGS)
        assert weights.dtype == given.dtype
        assert (weights >= 0).all()
        counts = (weights > 0).sum(dim=-1)
        assert bool((counts == 2).all()) == router.fixed_count


def test_sigmoids_are_of_the_largest_logits() -> None:
    weights = largest_sigmoids(logits(ties=True), 3)
    for token, row in enumerate(logits(ties=True).tolist()):
        best = sorted(range(EXPERTS), key=lambda expert: (-row[expert], expert))[:3]
        assert weights[token].nonzero().flatten().tolist() == sorted(best)
        for expert in best:
            assert weights[token, expert].item() == pytest.approx(1 / (1 + math.exp(-row[expert])))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.router.kind=expert_choice", "parallel.tensor=2", "parallel.expert=2"],
            "model.router.kind: expert_choice looks at all tokens of a microbatch",
        ),
        (["model.router.kind=top_p", "model.router.top_p=0"], "model.router.top_p: 0 is"),
        (
            ["model.router.kind=relu"],
            "model.router.balance: [aux_loss] beside the loss of model.router.kind=relu",
        ),
        (
            ["model.router.kind=top_p", "model.router.pre_softmax=true"],
            "model.router.pre_softmax: has no effect with model.router.kind=top_p",
        ),
        (
            [
                "model.router.kind=expert_choice",
                "model.router.num_groups=2",
                "model.router.group_topk=2",
            ],
            "model.router.num_groups: has no effect with model.router.kind=expert_choice",
        ),
        (
            ["model.router.kind=routing_free", *UNBALANCED, "model.router.threshold=0"],
            "model.router.threshold: 0 is not positive",
        ),
    ],
)
def test_what_a_router_cannot_do_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(problems(*overrides))
    assert found
    assert found[0].startswith(message)


HIDDEN, FEW, RANK = 6, 4, 3


def built(kind: str, **settings: Any) -> TopKRouter:
    alone = dist.new_group([0])
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=FEW,
        moe_router_topk=2, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32", add_bias_linear=False, cuda_graph_scope=[],
    )  # fmt: skip
    groups = SimpleNamespace(tp=alone, cp=alone, tp_cp=alone, tp_dp_cp=alone)
    known = {"kind": kind, "settings": RouterSettings(FEW, HIDDEN, 2, **settings)}
    cls = type(kind, (ROUTERS[kind].module,), known)
    router: TopKRouter = cls(config, pg_collection=groups)
    router.layer_number = 1
    return router


def tokens() -> Tensor:
    """Returns tokens ``[5, 1, 6]`` whose numbers a formula gives."""
    values = [[math.sin(1 + 3 * n + 7 * i) for i in range(HIDDEN)] for n in range(5)]
    return torch.tensor(values).unsqueeze(1)


def fill(router: TopKRouter) -> None:
    """Gives expert e the projection of which the recorded numbers are."""
    rows = [
        [0.5 * math.cos(2 + e + 5 * r + 4 * i * (e + 1)) for i in range(HIDDEN)]
        for e in range(FEW)
        for r in range(RANK)
    ]
    router.weight.data.copy_(torch.tensor(rows))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "router",
    [router for router in ROUTERS if router.reference is None or router.stock],
    ids=lambda router: router.name,
)
def test_exports_route_as_training_does(router: Router) -> None:
    """And the planner counts the weights that are there."""
    trained = built(router.name, rank=RANK, threshold=0.1)
    draw = torch.Generator().manual_seed(4)
    for parameter in trained.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=draw) + 0.1)
        parameter.data.mul_(1 - 2 * (torch.rand(parameter.shape, generator=draw) < 0.3))
    settings = RouterSettings(FEW, HIDDEN, 2, rank=RANK, threshold=0.1)
    described = router.weights(settings)
    assert {name: tuple(held.shape) for name, held in trained.named_parameters()} == {
        name: weight.shape for name, weight in described.items()
    }
    assert router.parameters(settings) == sum(held.numel() for held in trained.parameters())
    read = {name: getattr(settings, name) for name in router.settings}
    exported = MoneRouter(
        MoneConfig(
            hidden_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, num_experts=FEW,
            num_experts_per_tok=2, norm_topk_prob=True, router_kind=router.name,
            router_settings=read or None,
        )
    )  # fmt: skip
    exported.load_state_dict(trained.state_dict())
    probs, chosen = trained(tokens())
    _, weights_NK, index_NK = exported(tokens().squeeze(1))
    assert torch.equal(weights_NK.new_zeros(5, FEW).scatter(-1, index_NK, weights_NK) > 0, chosen)
    torch.testing.assert_close(
        weights_NK.new_zeros(5, FEW).scatter(-1, index_NK, weights_NK), probs.float()
    )


@pytest.mark.usefixtures("one_process")
def test_cosine_is_the_angle_in_a_small_space() -> None:
    router = built("cosine", rank=RANK)
    for number, parameter in enumerate((router.weight, router.projection)):
        parameter.data.copy_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        )
    router.temperature.data.fill_(0.7)
    found = router.gating(tokens()).squeeze(1)
    for token, x in enumerate(tokens().squeeze(1) @ router.projection.detach().T):
        for expert, direction in enumerate(router.weight.detach()):
            cosine = (
                float(x @ direction) / math.hypot(*x.tolist()) / math.hypot(*direction.tolist())
            )
            assert found[token, expert].item() == pytest.approx(cosine / 0.7, rel=1e-5)
    # Neither length matters.
    router.weight.data.mul_(3)
    torch.testing.assert_close(router.gating(2 * tokens()).squeeze(1), found)


@pytest.mark.usefixtures("one_process")
def test_relu_norm_is_torchs_norm_of_the_rectified_logits() -> None:
    router = built("relu_norm")
    router.weight.data.copy_(torch.randn(FEW, HIDDEN, generator=torch.Generator().manual_seed(0)))
    norm = torch.nn.RMSNorm(FEW, eps=1e-6)
    norm.weight.data.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    router.score_norm.weight.data.copy_(norm.weight.data)
    probs, chosen = router(tokens())
    expected = norm((tokens().squeeze(1) @ router.weight.T).relu())
    torch.testing.assert_close(probs, expected)
    assert torch.equal(chosen, expected > 0)


# What the authors' own MLP and losses (github.com/liuyilun2000/RoutingFreeMoE) give for these
# inputs with a rank of 3, a threshold of 0.25, scales 0.8 + 0.3 e and biases 0.1 e.
SCORES = [
    [0.400433, 0.0, 2.488256, 0.323616],
    [0.391570, 0.0, 2.470431, 0.307408],
    [0.378729, 0.0, 2.434795, 0.284560],
    [0.362575, 0.0, 2.383530, 0.256207],
    [0.344028, 0.0, 2.319910, 0.0],
]
BY_EXPERT, BY_TOKEN = 0.7455846071243286, 0.5346776247024536


@pytest.mark.usefixtures("one_process")
def test_routing_free_is_what_its_authors_compute() -> None:
    router = built("routing_free", rank=RANK, threshold=0.25)
    fill(router)
    router.score_norm.weight.data.copy_(0.8 + 0.3 * torch.arange(4))
    router.score_bias.data.copy_(0.1 * torch.arange(4))
    weights, chosen = router(tokens())
    torch.testing.assert_close(weights, torch.tensor(SCORES), rtol=0, atol=1e-6)
    assert torch.equal(chosen, weights > 0)
    function = ROUTERS["routing_free"].loss
    assert function is not None
    loss = function(RoutedWeights(weights, chosen.sum(dim=0), len(weights), 2))
    assert loss.item() == pytest.approx((BY_EXPERT + BY_TOKEN) / 2, rel=1e-6)


@pytest.mark.usefixtures("one_process")
def test_autonomy_ranks_by_the_norms_of_projections() -> None:
    router = built("autonomy", rank=RANK)
    fill(router)
    probs, chosen = router(tokens())
    x, projections = tokens().squeeze(1), router.weight.detach().view(FEW, RANK, HIDDEN)
    for token, weights, mask in zip(x, probs, chosen, strict=True):
        norms = [float((projection @ token).square().sum().sqrt()) for projection in projections]
        best = sorted(range(FEW), key=lambda expert: -norms[expert])[:2]
        total = sum(math.exp(norms[expert]) for expert in best)
        assert mask.nonzero().flatten().tolist() == sorted(best)
        for expert in best:
            assert weights[expert].item() == pytest.approx(math.exp(norms[expert]) / total)
    probs[:, 0].sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()


def test_relu_and_its_loss_are_those_of_remoe() -> None:
    """Its code takes megatron-core's balance loss, of the ReLU's output."""
    weights = relu(logits())
    assert torch.equal(weights, logits().clamp_min(0))
    function = ROUTERS["relu"].loss
    assert function is not None
    counts = (weights > 0).sum(dim=0)
    found = function(RoutedWeights(weights, counts, TOKENS, 2))
    expected = switch_load_balancing_loss_func(
        probs=weights, tokens_per_expert=counts, total_num_tokens=TOKENS, topk=2,
        num_experts=EXPERTS, moe_aux_loss_coeff=1.0,
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("one_process")
def test_the_loss_of_a_steered_router_pulls_with_its_coefficient() -> None:
    router = built("relu")
    router.weight.data.copy_(torch.randn(FEW, HIDDEN, generator=torch.Generator().manual_seed(0)))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))

    def gradient(coefficient: float) -> Tensor:
        router.coefficient = coefficient
        router.weight.grad = None
        weights, _ = router(tokens())
        (0 * weights).sum().backward()
        assert router.weight.grad is not None
        return router.weight.grad.clone()

    x = tokens().squeeze(1)
    copy = router.weight.detach().clone().requires_grad_()
    weights = relu(x @ copy.T)
    function = ROUTERS["relu"].loss
    assert function is not None
    function(RoutedWeights(weights, (weights > 0).sum(dim=0), len(x), 2)).backward()
    assert copy.grad is not None
    torch.testing.assert_close(gradient(0.5), 0.5 * copy.grad)
    assert not gradient(0.0).any()
    router.eval()
    assert router(tokens())[0].grad_fn.name() != "MoEAuxLossAutoScalerBackward"


def test_relu_comes_to_the_target_density(tmp_path: Path) -> None:
    run = (
        "experiment=tiny_moe", "device=cpu", "data.max_megabytes=0.2", "train.steps=40",
        "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
        "model.router.kind=relu", "model.router.density.start=0.02", "optim.lr=3e-3", *UNBALANCED,
    )  # fmt: skip
    run_layouts({"relu": run}, processes=1, folder=tmp_path)
    lines = (tmp_path / "relu" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    # Half of all logits are above 0 at first; the target is 2 of 8 experts.
    assert found[0]["router/step_density"] == pytest.approx(0.5, abs=0.1)
    assert found[-1]["router/step_density"] < 0.4
    for record, after in itertools.pairwise(found):
        alpha = 1.2 if record["router/step_density"] > 0.25 else 1 / 1.2
        assert after["router/steered"] == pytest.approx(min(1, record["router/steered"] * alpha))
    assert found[-1]["router/sparsity_loss"] < found[0]["router/sparsity_loss"]
