"""Where each method cannot work, its key says so: over the registries, with nothing left out."""

from __future__ import annotations

from dataclasses import fields

import pytest
from test_each_rule import problems

from mone_megatron.config.density import RouterDensityConfig
from mone_megatron.hf.experts_mone import NeuronSettings
from mone_megatron.methods.gate import Gate
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.router import Router
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import Rule
from mone_megatron.methods.rules import RULES

UNBALANCED = ("model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
FLEX = ("parallel.dispatcher=flex", "parallel.expert=2", "mone.balance.scope=group")
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
by_router = pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)


def refused(key: str, *overrides: str) -> list[str]:
    return [line for line in problems(*overrides) if line.startswith(f"{key}: ")]


def chosen(rule: Rule) -> tuple[str, ...]:
    return (f"mone.rule={rule.name}", f"mone.score={rule.score or 'abs_activation'}")


@by_rule
def test_expert_tensor_parallelism_where_a_rule_cannot_select_over_ranks(rule: Rule) -> None:
    layout = ("parallel.expert_tensor=2", "parallel.tensor=2")
    found = [
        line
        for line in problems(*chosen(rule), *layout)
        if f"mone.rule={rule.name} cannot select over ranks" in line
    ]
    assert bool(found) == (rule.exchange == "refused")
    assert all(line.startswith("parallel.expert_tensor: 2 spreads") for line in found)


@by_rule
def test_packed_memory_where_a_rule_may_keep_all(rule: Rule) -> None:
    budget = rule.budget(0.25, 64)
    found = refused("mone.memory", *chosen(rule), "mone.memory=packed", "mone.balance.coeff=0")
    assert bool(found) == (rule.most_kept(budget) >= 64)


@by_rule
def test_flex_where_a_rule_ranks_the_experts_of_a_token_together(rule: Rule) -> None:
    found = refused("parallel.dispatcher", *chosen(rule), *FLEX)
    # On a CPU it is refused in any case.
    assert (len(found) > 1) == rule.pools


@by_rule
def test_decoding_by_rows_is_of_the_k_largest_alone(rule: Rule) -> None:
    settings = NeuronSettings(0.25, rule.score or "abs_activation", rule=rule.name)
    assert settings.is_top_k == (rule.name == "topk")


@by_router
def test_flex_and_fused_permutation_where_tokens_have_other_numbers_of_experts(
    router: Router,
) -> None:
    own = UNBALANCED if router.loss is not None else ()
    kind = (f"model.router.kind={router.name}", *own)
    key = "megatron.transformer.moe_permute_fusion"
    found = list(problems(*kind, *FLEX, f"{key}=true"))
    assert any("flex needs as many experts" in line for line in found) == (not router.fixed_count)
    # Of fused permutation by itself another line is told where Transformer Engine is missing.
    unequal = [line for line in found if line.startswith(key) and "different numbers" in line]
    assert bool(unequal) == (not router.fixed_count)


@by_router
def test_a_limit_of_an_experts_tokens_where_a_router_assigns_by_itself(router: Router) -> None:
    """megatron-core drops the tokens beyond it in its own assignment alone."""
    own = UNBALANCED if router.loss is not None else ()
    key = "megatron.transformer.moe_expert_capacity_factor"
    found = refused(key, f"model.router.kind={router.name}", *own, f"{key}=1.5")
    assert bool(found) == router.own_weights


@by_rule
def test_rows_of_no_token_in_experts_that_select(rule: Rule) -> None:
    """Seen with `pooled`, `batch_topk`, `mass` and the balance loss: each took them for tokens."""
    key = "megatron.transformer.moe_pad_expert_input_to_capacity"
    padded = ("megatron.transformer.moe_expert_capacity_factor=1.0", f"{key}=true")
    assert len(refused(key, *chosen(rule), *padded)) == 1
    # Which tokens are dropped is nothing to a rule, and experts that keep all do not look.
    assert not refused(key, *chosen(rule), padded[0])
    assert not refused(key, *chosen(rule), "mone.enabled=false", *padded)


@by_router
def test_a_model_without_experts(router: Router) -> None:
    found = refused(
        "model.router.kind", f"model.router.kind={router.name}", "model.num_experts=0",
        "mone.enabled=false",
    )  # fmt: skip
    assert bool(found) == (not router.stock)


@by_router
@pytest.mark.parametrize("key", [field.name for field in fields(RouterDensityConfig)])
def test_a_controller_where_a_router_has_no_loss(router: Router, key: str) -> None:
    own = UNBALANCED if router.loss is not None else ()
    value = {"step": "squared", "target": 0.4, "rate": 0.1, "start": 0.01, "cap": 0.5}[key]
    key = f"model.router.density.{key}"
    found = refused(key, f"model.router.kind={router.name}", *own, f"{key}={value}")
    assert bool(found) == (router.loss is None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.router.kind=relu", *UNBALANCED, "model.router.density.start=2"),
            "model.router.density.start: 2 is more than model.router.density.cap=1, the largest",
        ),
        (
            (
                "model.router.kind=dynmoe", *UNBALANCED, "model.router.density.start=0.01",
                "model.router.density.cap=0.001",
            ),
            "model.router.density.start: 0.01 is more than model.router.density.cap=0.001",
        ),
        (
            (
                "model.router.kind=deco", *UNBALANCED, "model.router.density.step=off",
                "model.router.density.target=0.4",
            ),
            "model.router.density.target: 0.4 has no effect with model.router.density.step=off",
        ),
        (
            (
                "model.router.kind=relu", *UNBALANCED, "model.router.density.step=off",
                "model.router.density.start=0.01", "model.router.density.rate=0.1",
            ),
            "model.router.density.rate: 0.1 has no effect with model.router.density.step=off",
        ),
        (
            (
                "mone.rule=nonzero", "mone.score=abs_product", "model.sparsity_loss=l1",
                "mone.density.step=alpha", "mone.density.start=3",
            ),
            "mone.density.start: 3 is more than mone.density.cap=1, the largest coefficient",
        ),
    ],
)  # fmt: skip
def test_a_coefficient_that_cannot_begin_or_go_there(
    overrides: tuple[str, ...], message: str
) -> None:
    (found,) = problems(*overrides)
    assert found.startswith(message)


@by_router
def test_a_split_microbatch_where_a_router_reads_all_of_it(router: Router) -> None:
    own = UNBALANCED if router.loss is not None else ()
    kind = (f"model.router.kind={router.name}", *own)
    split = ("parallel.tensor=2", "parallel.expert=2")
    assert bool(refused("model.router.kind", *kind, *split)) == router.reads_batch


@by_router
def test_options_of_other_routers(router: Router) -> None:
    own = UNBALANCED if router.loss is not None else ()
    kind = (f"model.router.kind={router.name}", *own)
    others = {name for other in ROUTERS for name in other.option_names} | {"no_such_option"}
    found = problems(*kind, *(f"model.router.options.{name}=1" for name in others))
    keys = {line.split(":")[0].removeprefix("model.router.options.") for line in found}
    assert keys == others - set(router.option_names)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_a_rank_where_a_gate_has_none(gate: Gate) -> None:
    found = refused("model.gate_rank", f"model.gate={gate.name}", "model.gate_rank=8")
    assert bool(found) == (not gate.ranked)
