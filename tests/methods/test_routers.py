"""What each router of ours chooses, against brute force; causality as it is declared."""

from __future__ import annotations

import pytest
import torch
from test_each_rule import problems
from torch import Tensor

from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.routers.expert_choice import expert_choice
from mone_megatron.methods.routers.top_p import top_p

TOKENS, EXPERTS = 24, 8
ASSIGN = {
    "expert_choice": lambda logits: expert_choice(logits, 2),
    "top_p": lambda logits: top_p(logits, 0.5),
}


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


@pytest.mark.parametrize("kind", [router.name for router in ROUTERS if router.name in ASSIGN])
def test_a_causal_router_looks_at_no_later_token(kind: str) -> None:
    changed = logits()
    changed[TOKENS // 2 :] *= 3
    before = ASSIGN[kind](logits())[: TOKENS // 2]
    after = ASSIGN[kind](changed)[: TOKENS // 2]
    assert torch.equal(before, after) == ROUTERS[kind].causal


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.router.kind=expert_choice", "parallel.tensor=2", "parallel.expert=2"],
            "model.router.kind: expert_choice looks at all tokens of a microbatch",
        ),
        (["model.router.kind=top_p", "model.router.top_p=0"], "model.router.top_p: 0 is"),
    ],
)
def test_what_a_router_cannot_do_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(problems(*overrides))
    assert len(found) == 1, found
    assert found[0].startswith(message)
