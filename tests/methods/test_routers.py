"""What each router of ours chooses, against brute force; causality as it is declared."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
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

from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.modeling_mone import MoneRouter
from mone_megatron.methods.router import RoutedWeights, Router, RouterSettings
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.routers.dynmoe import even_and_few
from mone_megatron.methods.routers.expert_choice import expert_choice
from mone_megatron.methods.routers.relu import relu
from mone_megatron.methods.routers.sigmoid_topk import largest_sigmoids
from mone_megatron.methods.routers.top_p import top_p
from mone_megatron.model.transformer import transformer_config
from mone_megatron.testing.launch import run_layouts

TOKENS, EXPERTS = 24, 8
UNBALANCED = ("model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
# A layer's, of the functions; routers take k = 2 experts.
GIVEN = {"rank": 3, "top_p": 0.5, "threshold": 0.5}


def settings_of(router: Router, experts: int = 8, hidden: int = 16, **given: Any) -> RouterSettings:
    """Returns what a router reads, with those of the options that it has."""
    known = {name: value for name, value in given.items() if name in router.option_names}
    return RouterSettings(experts, hidden, 2, router.read_options(known))


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
    before = router.assign(logits(), settings_of(router, **GIVEN))[: TOKENS // 2]
    after = router.assign(changed, settings_of(router, **GIVEN))[: TOKENS // 2]
    assert torch.equal(before, after) == router.causal


@pytest.mark.parametrize("router", ASSIGNING, ids=lambda router: router.name)
def test_a_router_assigns_as_it_says(router: Router) -> None:
    assert router.assign is not None
    for given in (logits(), logits(ties=True), logits().bfloat16()):
        weights = router.assign(given, settings_of(router, **GIVEN))
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
            ["model.router.kind=deco"],
            "model.router.balance: [aux_loss] beside the loss of model.router.kind=deco: it evens "
            "out the softmax of logits, by which this router does not weigh experts; set "
            "model.router.balance=[none] and model.router.balance_coeff=[0.0]",
        ),
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
        (
            ["model.router.kind=routing_free", *UNBALANCED, "model.router.options.threshold=0"],
            "model.router.options.threshold: 0 is not positive; use a number above 0",
        ),
        (
            ["model.router.kind=top_p", "model.router.options.top_p=1.5"],
            "model.router.options.top_p: 1.5 is outside (0, 1]; use a share such as 0.4",
        ),
        (
            ["model.router.kind=autonomy", "model.router.options.rank=-1"],
            "model.router.options.rank: -1 is negative; use 0 or more",
        ),
        (
            ["model.router.kind=autonomy", "model.router.options.rank=2.5"],
            "model.router.options.rank: expected an integer",
        ),
        (
            ["model.router.kind=autonomy", "model.router.options.top_p=0.5"],
            "model.router.options.top_p: unknown key; see docs/configuration.md for the keys "
            "(options of model.router.kind=autonomy: rank)",
        ),
        (
            ["model.router.options.rank=3"],
            "model.router.options.rank: unknown key; see docs/configuration.md for the keys "
            "(options of model.router.kind=topk: none)",
        ),
        (
            ["model.router.kind=cosine", "model.router.threshold=0.5"],
            "model.router.threshold: 0.5 has no effect with model.router.kind=cosine, whose options"
            " are rank; leave it out",
        ),
        (
            ["model.router.kind=cosine", "model.router.rank=3", "model.router.options.rank=4"],
            "model.router.rank: 3 beside model.router.options.rank=4, which is the same option",
        ),
        (
            ["model.router.kind=deco", *UNBALANCED, "model.router.options.scale=-1"],
            "model.router.options.scale: -1 is not positive",
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
    known = {"kind": kind, "settings": settings_of(ROUTERS[kind], FEW, HIDDEN, **settings)}
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
    settings = settings_of(router, FEW, HIDDEN, rank=RANK, threshold=0.1)
    described = router.weights(settings)
    assert {name: tuple(held.shape) for name, held in trained.named_parameters()} == {
        name: weight.shape for name, weight in described.items()
    }
    assert router.parameters(settings) == sum(held.numel() for held in trained.parameters())
    read = asdict(settings.options)
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
    found = weights_NK.new_zeros(5, FEW).scatter(-1, index_NK, weights_NK)
    assert torch.equal(found != 0, chosen)
    torch.testing.assert_close(found, probs.float())


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


BLOCK_FFN = [
    [0.6625687, 0.0, 0.0, 2.9959936],
    [0.0, 1.9353056, 0.7567910, 0.0],
    [0.6743737, 0.0, 0.0, 2.9535472],
    [0.0, 1.8305999, 1.2082530, 0.0],
    [0.6901926, 0.0, 0.0, 2.8944817],
]


@pytest.mark.usefixtures("one_process")
def test_relu_norm_is_what_its_authors_compute() -> None:
    router = built("relu_norm")
    router.weight.data.copy_(torch.tensor(ROWS))
    router.score_norm.weight.data.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    weights, chosen = router(tokens())
    torch.testing.assert_close(weights, torch.tensor(BLOCK_FFN), rtol=0, atol=1e-6)
    assert torch.equal(chosen, torch.tensor(BLOCK_FFN) > 0)


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


# What the authors' own routines give for tokens() and these projections, or the rows of ROWS
# (github.com/trestad/Autonomy-of-Experts, ZhenweiAn/Dynamic_MoE, LINs-lab/DynMoE, thunlp/BlockFFN,
# thunlp/DECO, RobertCsordas/moe; of X-MoE's cosine microsoft/tutel).
ROWS = [[math.cos(1 + 2 * e + 3 * i) for i in range(HIDDEN)] for e in range(FEW)]
AUTONOMY = [
    [0.1479442, 0.0, 0.6118433, 0.0],
    [0.1476699, 0.0, 0.6096997, 0.0],
    [0.1479132, 0.0, 0.6049891, 0.0],
    [0.1486318, 0.0, 0.5980242, 0.0],
    [0.1497483, 0.0, 0.5892530, 0.0],
]
TOP_P = {
    0.4: [
        [0.3541153, 0.0, 0.0, 0.3856122],
        [0.0, 0.4491891, 0.0, 0.0],
        [0.3510382, 0.0, 0.0, 0.3716140],
        [0.0, 0.3983492, 0.3119950, 0.0],
        [0.3395159, 0.0, 0.0, 0.3478235],
    ],
    0.8: [
        [0.3541153, 0.0, 0.1625032, 0.3856122],
        [0.1336649, 0.4491891, 0.2927423, 0.0],
        [0.3510382, 0.0, 0.1620001, 0.3716140],
        [0.1477947, 0.3983492, 0.3119950, 0.0],
        [0.3395159, 0.0, 0.1675782, 0.3478235],
    ],
}


@pytest.mark.usefixtures("one_process")
def test_autonomy_is_what_its_authors_compute() -> None:
    """They weigh by a softmax over all experts, which is ``model.router.pre_softmax``."""
    router = built("autonomy", rank=RANK)
    router.config.moe_router_pre_softmax = True
    fill(router)
    probs, _ = router(tokens())
    torch.testing.assert_close(probs, torch.tensor(AUTONOMY), rtol=0, atol=1e-6)


SIGMA = [
    [0.6577346, 0.0, 0.0, 0.6766513],
    [0.0, 0.6408666, 0.5376726, 0.0],
    [0.6456739, 0.0, 0.0, 0.6585946],
    [0.0, 0.6073868, 0.5478529, 0.0],
    [0.6222565, 0.0, 0.0, 0.6279218],
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [*(("top_p", {"top_p": p}, TOP_P[p]) for p in TOP_P), ("sigmoid_topk", {}, SIGMA)],
)
def test_weights_are_what_the_authors_compute(
    kind: str, options: dict[str, float], expected: list[list[float]]
) -> None:
    router = built(kind, **options)
    router.weight.data.copy_(torch.tensor(ROWS))
    weights, chosen = router(tokens())
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(chosen, weights > 0)


# With the first three rows as the projection, and the first three columns as the directions.
COSINES = [
    [1.2899727, -1.5021884, 1.8908367, 1.3685406],
    [-1.2276134, 1.4516994, -1.8949152, -1.3101473],
    [1.1534324, -1.3904140, 1.8944815, 1.2402540],
    [-1.0608398, 1.3122933, -1.8869295, -1.1524436],
    [0.9386557, -1.2068237, 1.8666869, 1.0357341],
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("temperature", [0.5, 0.005])
def test_cosine_is_what_tutel_computes(temperature: float) -> None:
    """No temperature below 0.01 counts."""
    router = built("cosine", rank=RANK)
    router.projection.data.copy_(torch.tensor(ROWS)[:RANK])
    router.weight.data.copy_(torch.tensor(ROWS)[:, :RANK])
    router.temperature.data.fill_(temperature)
    found = router.gating(tokens()).squeeze(1)
    expected = torch.tensor(COSINES) * 0.5 / max(temperature, 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Theirs outside training; in training tokens 0 and 2, which no expert takes, have none.
DYNMOE = [
    [1.0, 0.0, 0.0, 0.0],
    [0.0, 0.5, 0.5, 0.0],
    [1.0, 0.0, 0.0, 0.0],
    [0.0, 0.5, 0.5, 0.0],
    [0.0, 1.0, 0.0, 0.0],
]
# Of a sum of weights times sin(1 + n + 2 e), over the tokens that experts take.
DYNMOE_ROWS = [
    [0.0] * 6,
    [0.0352674, 0.0829359, 0.0639475, 0.0380010, -0.0293557, -0.0618221],
    [-0.0539720, -0.0742471, -0.0828641, -0.0499388, 0.0309534, 0.0495472],
    [0.0] * 6,
]
DYNMOE_THRESHOLDS = [0.0, -0.0346328, -0.0886874, 0.0]
DYNMOE_EVEN, DYNMOE_FEW, DYNMOE_APART = 1.92, 0.35, 4.239659786224365
# Of the last of the three, which is a function of ROWS alone.
DYNMOE_APART_ROWS = [
    [0.0680214, -0.0833426, 0.0969958, -0.1087075, 0.1182436, -0.1254129],
    [0.0128178, 0.0400356, -0.0920877, 0.1422966, -0.1896575, 0.2332224],
    [-0.4834062, 0.4902389, -0.4872595, 0.4745275, -0.4522980, 0.4210157],
    [0.0395289, -0.0655039, 0.0901677, -0.1130270, 0.1336239, -0.1515464],
]


@pytest.mark.usefixtures("one_process")
def test_dynmoe_is_what_its_authors_compute() -> None:
    router = built("dynmoe")
    router.weight.data.copy_(torch.tensor(ROWS))
    router.threshold.data.copy_(torch.tensor([0.3, -0.1, 0.05, 0.4]))
    weights, chosen = router(tokens())
    torch.testing.assert_close(weights, torch.tensor(DYNMOE), rtol=0, atol=0)
    assert torch.equal(chosen, weights > 0)
    upstream = torch.tensor([[math.sin(1 + n + 2 * e) for e in range(FEW)] for n in range(5)])
    upstream[[0, 2]] = 0
    (weights * upstream).sum().backward()
    for parameter, expected in (
        (router.weight, DYNMOE_ROWS), (router.threshold, DYNMOE_THRESHOLDS),
    ):  # fmt: skip
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), rtol=0, atol=1e-6)
    function = ROUTERS["dynmoe"].loss
    assert function is not None
    loads = chosen.sum(dim=0)
    loss = function(RoutedWeights(weights, loads, len(weights), 2, router.held))
    assert loss.item() == pytest.approx(DYNMOE_EVEN + DYNMOE_FEW + DYNMOE_APART, rel=1e-6)
    # Ranks that share the tokens have parts of it that add up, of what reads no token, too.
    parts = [
        function(RoutedWeights(part, loads, len(weights), 2, router.held))
        for part in (weights[:1], weights[1:])
    ]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-6)
    # All three parts are attached in training: without the first two, what pulls is the third.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    router.coefficient, router.weight.grad = 1.0, None
    (0 * router(tokens())[0]).sum().backward()
    pulled = router.weight.grad
    router.coefficient, router.weight.grad = 0.0, None
    weights, _ = router(tokens())
    even_and_few(RoutedWeights(weights, loads, len(weights), 2)).backward()
    expected = torch.tensor(DYNMOE_APART_ROWS)
    torch.testing.assert_close(pulled - router.weight.grad, expected, rtol=0, atol=1e-5)


def by_thresholds(scores: list[float], thresholds: list[float]) -> list[float]:
    above = [score > threshold for score, threshold in zip(scores, thresholds, strict=True)]
    if not any(above):
        above = [expert == scores.index(max(scores)) for expert in range(len(scores))]
    return [taken / sum(above) for taken in above]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", ["fp32", "fp64", None])
@pytest.mark.parametrize("threshold", [-5.0, 0.0, 0.2, 5.0])
def test_dynmoe_by_hand(threshold: float, dtype: str | None) -> None:
    """All experts, some, and none but the best; also where a difference of bf16 would be 0."""
    router = built("dynmoe")
    router.config.moe_router_dtype = dtype
    x = tokens() if dtype else tokens().bfloat16()
    draw = torch.Generator().manual_seed(3)
    router.weight.data.copy_(torch.randn(FEW, HIDDEN, generator=draw))
    if dtype is None:
        router.bfloat16()
    router.threshold.data.fill_(threshold)
    weights, _ = router(x)
    limit = 1 / (1 + math.exp(-float(router.threshold.detach()[0])))
    for token, row in zip(x.squeeze(1).double(), weights, strict=True):
        scores = [
            1 / (1 + math.exp(-float(token @ direction / token.norm() / direction.norm())))
            for direction in router.weight.detach().double()
        ]
        if min(abs(score - limit) for score in scores) > 1e-3:
            assert row.tolist() == pytest.approx(by_thresholds(scores, [limit] * FEW), rel=1e-2)
        assert row.float().sum().item() == pytest.approx(1, rel=1e-2)


DECO = [
    [0.0653215, 0.0, 0.0, 0.2215275],
    [0.0, 0.1158255, -0.0075488, 0.0],
    [0.0600077, 0.0, 0.0, 0.1971113],
    [0.0, 0.0872682, -0.0096000, 0.0],
    [0.0499137, 0.0, 0.0, 0.1569934],
]
DECO_ENTROPY = 0.6402710676193237


@pytest.mark.usefixtures("one_process")
def test_deco_is_what_its_authors_compute() -> None:
    """A scale below 0 is one, too: the experts that a token goes to are those without it."""
    router = built("deco")
    assert router.method_weights["score_scale"].initial == 0.1
    router.weight.data.copy_(torch.tensor(ROWS))
    router.score_scale.data.copy_(torch.tensor([0.1, 0.2, -0.05, 0.3]))
    weights, chosen = router(tokens())
    torch.testing.assert_close(weights, torch.tensor(DECO), rtol=0, atol=1e-6)
    assert torch.equal(chosen, torch.tensor(DECO) != 0)
    assigned = (tokens().squeeze(1) @ torch.tensor(ROWS).T).relu()
    function = ROUTERS["deco"].loss
    assert function is not None
    loss = function(RoutedWeights(assigned, chosen.sum(dim=0), len(weights), 2))
    assert loss.item() == pytest.approx(DECO_ENTROPY, rel=1e-6)
    # The coefficient steers the loss of what is assigned; scales do not change it.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    router.coefficient = 0.5
    (0 * router(tokens())[0]).sum().backward()
    assert not router.score_scale.grad.any()
    copy = torch.tensor(ROWS, requires_grad=True)
    assigned = (tokens().squeeze(1) @ copy.T).relu()
    (0.5 * function(RoutedWeights(assigned, chosen.sum(dim=0), len(weights), 2))).backward()
    torch.testing.assert_close(router.weight.grad, copy.grad)


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
        "model.num_layers=2", "train.global_batch_size=4",
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


@pytest.mark.parametrize("kind", [router.name for router in ROUTERS if router.own_weights])
def test_routers_that_weigh_by_themselves_train_with_one_expert_a_token(kind: str) -> None:
    """megatron-core refuses one expert without pre-softmax, which these do not read."""
    config = compose(
        [
            "experiment=tiny_mone",
            f"model.router.kind={kind}",
            "model.experts_per_token=1",
            *(UNBALANCED if ROUTERS[kind].loss is not None else ()),
        ]
    )
    validate(config, world_size=1)
    transformer_config(config, dtype=torch.float32, on_cpu=True, sequence_parallel=False)
