"""What a token costs, where neurons and experts are counted and where they are measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mone_megatron.config.load import compose
from mone_megatron.methods.gates import GATES
from mone_megatron.planning.budget import (
    Usage,
    active_are_measured,
    budget_of,
    experts_are_fixed,
    neurons_are_fixed,
)
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
    found = budget_of(quarter, VOCAB, Usage(density={"routed": 0.5}))
    assert found == budget_of(half, VOCAB, Usage())


def test_each_kind_of_mlp_has_a_density_of_its_own() -> None:
    """Half the neurons of shared experts, and as many of routed ones as are set."""
    shared = [
        "experiment=tiny_mone", f"model.vocab_size={VOCAB}", "mone.apply_to=[routed,shared]",
        "mone.keep_ratio=0.25", "mone.rule=mass", "model.shared_expert_ffn_hidden_size=64",
    ]  # fmt: skip
    config = compose(shared)
    set_alone = budget_of(config, VOCAB, Usage())
    found = budget_of(config, VOCAB, Usage(density={"shared": 0.5}))
    model = config.model
    more = model.num_layers * 2 * model.hidden_size * 64 // 4
    assert found.activated - set_alone.activated == more
    both = budget_of(config, VOCAB, Usage(density={"routed": 0.5, "shared": 0.5}))
    half = compose([*shared, "mone.keep_ratio=0.5"])
    assert both == budget_of(half, VOCAB, Usage())


@pytest.mark.parametrize("gate", ["full", "split", "low_rank"])
@pytest.mark.parametrize("kind", ["drelu", "relu"])
def test_up_projections_of_neurons_without_activation_cost_nothing(kind: str, gate: str) -> None:
    """The count is an enumeration of the weights that some tokens read, in one expert of each."""
    config = compose(
        [
            "experiment=tiny_mone", f"model.vocab_size={VOCAB}", f"model.activation={kind}",
            "mone.rule=nonzero", "mone.score=abs_product", f"model.gate={gate}",
        ]
    )  # fmt: skip
    model = config.model
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    gates, ups = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(5))
    size = replace(model.gate_size, neurons=width)
    read = 0
    for token_gates, token_ups in zip(gates.tolist(), ups.tolist(), strict=True):
        read += GATES[gate].gate_parameters(size)
        for g, u in zip(token_gates, token_ups, strict=True):
            if g > 0:
                # With ReLU the up projection is not rectified, and no other neuron is kept.
                read += GATES[gate].up_inputs(size)
                read += hidden * (u > 0 or kind == "relu")
    rectified = ups > 0 if kind == "drelu" else torch.ones_like(ups).bool()
    usage = Usage(
        density={"routed": ((gates > 0) & rectified).float().mean().item()},
        active={"routed": (gates > 0).float().mean().item()} if kind == "drelu" else {},
    )
    assert active_are_measured(config) == (kind == "drelu")
    found = budget_of(config, VOCAB, usage)
    visits = model.num_layers * model.experts_per_token
    nothing = budget_of(config, VOCAB, Usage(density={"routed": 0.0}, active={"routed": 0.0}))
    whole = GATES[gate].gate_parameters(size)
    assert found.activated - nothing.activated == pytest.approx(visits * (read / 6 - whole))
    assert found.decode_bytes - nothing.decode_bytes == pytest.approx(
        2 * (found.activated - nothing.activated)
    )
    tokens = config.train.global_batch_size * config.train.seq_length
    assert found.step_flops - nothing.step_flops == pytest.approx(
        6 * tokens * (found.activated - nothing.activated)
    )


def test_active_neurons_that_nobody_measured_are_all() -> None:
    config = compose(
        [
            "experiment=tiny_mone", f"model.vocab_size={VOCAB}", "model.activation=drelu",
            "mone.rule=nonzero", "mone.score=abs_product",
        ]
    )  # fmt: skip
    assert budget_of(config, VOCAB, Usage(density={"routed": 0.2})) == budget_of(
        config, VOCAB, Usage(density={"routed": 0.2}, active={"routed": 1.0})
    )
    # Others have no use for it: they need the up projections of all neurons, or of kept ones.
    for override in ("mone.score=abs_activation", "mone.rule=topk", "model.activation=relu"):
        other = compose(
            [
                "experiment=tiny_mone", f"model.vocab_size={VOCAB}", "model.activation=drelu",
                "mone.rule=nonzero", "mone.score=abs_product", override,
            ]
        )  # fmt: skip
        assert not active_are_measured(other)
        kept = Usage(density={"routed": 0.2})
        active = replace(kept, active={"routed": 0.5})
        assert budget_of(other, VOCAB, kept) == budget_of(other, VOCAB, active)


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
