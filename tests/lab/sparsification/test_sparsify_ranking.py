"""Scores and masks: by hand, and their properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_models import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.lab.sparsification.places import decoder_layers, places_of
from mone_megatron.lab.sparsification.plans import (
    SCORES,
    Choice,
    check_scores,
    check_shares,
    check_tops,
    dense,
    kept_neurons,
    plan,
    uniform,
)
from mone_megatron.lab.sparsification.ranking import Pruner, Rows, score_rows


def rows_of(gate: Tensor, up: Tensor, norms: Tensor, own: Tensor | None = None) -> Rows:
    return Rows(gate, up, F.silu(gate) * up, F.silu, own, lambda: norms)


def test_scores_by_hand() -> None:
    gate, up = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[-3.0, 1.0, 4.0]])
    norms = torch.tensor([[1.0, 10.0, 2.0]])
    # SiLU: 1 / (1 + e^-1), -2 / (1 + e^2), 0.5 / (1 + e^-0.5).
    a = [0.731059, -0.238406, 0.311230]
    expected = {
        "abs_activation": [0.731059, 0.238406, 0.311230],
        "abs_gate": [1.0, 2.0, 0.5],
        "signed_gate": [1.0, -2.0, 0.5],
        "abs_product": [2.193176, 0.238406, 1.244919],
        "wina": [2.193176, 2.384058, 2.489837],
        "wina_activation": [0.731059, 2.384058, 0.622459],
        # Of one MLP: no router weighs it.
        "contribution": [2.193176, 2.384058, 2.489837],
        "bottom_k": [-abs(value) for value in a],
    }
    rows = rows_of(gate, up, norms)
    for score, values in expected.items():
        torch.testing.assert_close(score_rows(score, rows), torch.tensor([values]))
    assert set(expected) | {"random"} == set(SCORES)
    with pytest.raises(ValueError, match="'size' is unknown"):
        score_rows("size", rows)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_wina_weighs_a_neuron_by_the_norm_of_its_column(name: str) -> None:
    """What a neuron adds to the output has exactly WINA's score as its norm."""
    model = random_model(name)
    layer = decoder_layers(model)[0]
    (place,) = places_of(layer, ("routed", "dense"))
    seen: list[Rows] = []
    tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    # Experts of the three tokens; rows come sorted by expert.
    chosen = torch.tensor([[3], [0], [2]])
    with place.attached(seen.append), torch.no_grad():  # type: ignore[arg-type]
        if name == "mixtral":
            place.module(tokens, chosen, torch.ones(3, 1))
        else:
            place.module(tokens)
    scores = score_rows("wina", seen[0])
    order = [1, 2, 0] if name == "mixtral" else [0, 1, 2]
    for row, token in enumerate(order):
        if name == "mixtral":
            expert = int(chosen[token])
            gate, up = (place.module.gate_up_proj[expert] @ tokens[token]).chunk(2)
            down = place.module.down_proj[expert]
        else:
            gate, up = place.module.gate_proj(tokens[token]), place.module.up_proj(tokens[token])
            down = place.module.down_proj.weight
        hidden = F.silu(gate) * up
        for neuron in range(0, len(hidden), 7):
            added = hidden[neuron] * down[:, neuron]
            torch.testing.assert_close(scores[row, neuron], added.norm(), rtol=1e-4, atol=1e-6)


def test_an_interleaved_transposed_layout_has_its_norms_along_the_other_axis() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    layer = decoder_layers(AutoModelForCausalLM.from_config(config).eval())[0]
    (place,) = places_of(layer, ("routed",))
    assert place.neurons == 24
    seen: list[Rows] = []
    with place.attached(seen.append), torch.no_grad():  # type: ignore[arg-type]
        place.module(torch.randn(2, 32), torch.tensor([[2], [1]]), torch.ones(2, 1))
    # [experts, neurons, hidden].
    torch.testing.assert_close(
        seen[0].column_norms()[0], place.module.down_proj[1].detach().norm(dim=-1)
    )


@given(
    neurons=st.integers(1, 40),
    share=st.floats(0, 0.999),
    score=st.sampled_from(sorted(SCORES)),
    own=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_lowest_go_and_those_left_out_already_first(
    neurons: int, share: float, score: str, own: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(3, neurons, generator=generator)
    own_mask = None
    if own:
        own_mask = torch.rand(3, neurons, generator=generator) < 0.5
    rows = rows_of(gate, torch.randn(3, neurons, generator=generator), torch.ones(1, 1), own_mask)
    mask = Pruner(Choice(score, share), seed=seed)(rows)
    kept = kept_neurons(share, neurons)
    assert mask.sum(dim=-1).tolist() == [kept] * 3
    if own_mask is not None:
        both = mask & own_mask
        room = own_mask.sum(dim=-1).clamp(max=kept)
        assert both.sum(dim=-1).tolist() == room.tolist()
    elif score != "random":
        scores = score_rows(score, rows)
        lowest_kept = scores.masked_fill(~mask, torch.inf).amin(dim=-1)
        assert (scores.masked_fill(mask, -torch.inf).amax(dim=-1) <= lowest_kept).all()


@given(share=st.floats(0, 0.999), neurons=st.integers(1, 20000))
def test_at_least_one_neuron_stays(share: float, neurons: int) -> None:
    assert 1 <= kept_neurons(share, neurons) <= neurons
    assert (
        kept_neurons(share, neurons) == 1
        or abs(kept_neurons(share, neurons) - (1 - share) * neurons) <= 0.5 + 1e-9
    )


def test_pruning_nothing_is_one_plan() -> None:
    assert uniform("abs_gate", 0.0, 3) == dense(3) == plan("random", [0, 0, 0])
    assert plan("abs_gate", [0, 0.5, 0]).at(0) is None
    assert plan("abs_gate", [0, 0.5, 0]).at(1) == Choice("abs_gate", 0.5)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (check_scores, ["size"], "--scores: 'size' is unknown; use some of abs_activation, "),
        (check_scores, ["wina", "wina"], "--scores: wina is named twice"),
        (check_shares, [0.5, 1.0], r"--shares: 1 is not in \[0, 1\)"),
        (check_shares, [-0.1], "--shares: -0.1 is not in"),
        (check_shares, [float("nan")], "--shares: nan is not in"),
        (check_tops, [0.0], r"--top: 0 is not in \(0, 1\]"),
        (check_tops, [float("nan")], "--top: nan is not in"),
    ],
)
def test_what_makes_no_sense_is_refused(check: object, values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(values)  # type: ignore[operator]
    assert check_shares([0.5, 0, 0.5]) == (0.0, 0.5)
