"""What a token costs, where neurons and experts are counted and where they are measured."""

from __future__ import annotations

import pytest

from mone_megatron.config.load import compose
from mone_megatron.planning.budget import Usage, budget_of, experts_are_fixed, neurons_are_fixed
from mone_megatron.planning.flops import flops_per_step
from mone_megatron.planning.match import value_of

VOCAB = 512


@pytest.mark.parametrize("experiment", ["tiny_moe", "tiny_mone", "mone_0.9b", "claims_mone"])
def test_a_usage_of_what_is_set_changes_nothing(experiment: str) -> None:
    config = compose([f"experiment={experiment}", f"model.vocab_size={VOCAB}"])
    budget = budget_of(config, VOCAB, Usage())
    assert budget.activated == value_of(config, "activated")
    assert budget.step_flops == flops_per_step(config, VOCAB).ideal
    assert neurons_are_fixed(config)
    assert experts_are_fixed(config)


def test_measured_neurons_cost_as_those_of_another_keep_ratio() -> None:
    quarter, half = (
        compose(["experiment=tiny_mone", f"model.vocab_size={VOCAB}", f"mone.keep_ratio={ratio}"])
        for ratio in (0.25, 0.5)
    )
    assert budget_of(quarter, VOCAB, Usage(density=0.5)) == budget_of(half, VOCAB, Usage())


def test_measured_experts_cost_as_those_that_are_set() -> None:
    one, three = (
        compose(["experiment=tiny_moe", f"model.vocab_size={VOCAB}", *options])
        for options in (["model.experts_per_token=2"], ["model.experts_per_token=3"])
    )
    assert budget_of(one, VOCAB, Usage(experts=3.0)) == budget_of(three, VOCAB, Usage())


def test_decoding_reads_one_row_of_an_embedding_that_is_not_tied() -> None:
    tied, untied = (
        compose(["experiment=tiny_moe", f"model.vocab_size={VOCAB}", f"model.tie_embeddings={tie}"])
        for tie in ("true", "false")
    )
    hidden = tied.model.hidden_size
    a, b = (budget_of(config, VOCAB, Usage()) for config in (tied, untied))
    assert b.activated - a.activated == VOCAB * hidden
    assert b.decode_bytes - a.decode_bytes == 2 * hidden


def test_says_which_methods_fix_what_a_token_uses() -> None:
    mass = compose(["experiment=tiny_mone", "mone.rule=mass"])
    assert not neurons_are_fixed(mass)
    assert experts_are_fixed(mass)
    top_p = compose(["experiment=tiny_moe", "model.router.kind=top_p"])
    assert neurons_are_fixed(top_p)
    assert not experts_are_fixed(top_p)
