"""Calibrated thresholds: the quantile, what they keep, and what is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import random_model
from hypothesis import given
from hypothesis import strategies as st
from sparsify_helpers import calibration_of, engine_of, ignore, random_text
from test_sparsify_ranking import rows_of

from mone_megatron.hf.experts_mone import ExpertRows
from mone_megatron.lab.sparsification.places import Place
from mone_megatron.lab.sparsification.plans import SCORES, Cut, Made, Plan, kept_neurons
from mone_megatron.lab.sparsification.ranking import Cutter, Rows, score_rows
from mone_megatron.lab.sparsification.thresholds import ScoreCounts
from mone_megatron.lab.sparsification.use import Use, tallies_json


def seen(place: Place, tokens: torch.Tensor, chosen: torch.Tensor | None) -> Rows:
    """The rows that a place computes of some tokens."""
    rows: list[Rows] = []
    with place.attached(rows.append), torch.no_grad():  # type: ignore[arg-type]
        if chosen is None:
            place.module(tokens)  # type: ignore[attr-defined]
        else:
            place.module(tokens, chosen, torch.rand(chosen.shape))  # type: ignore[attr-defined]
    return rows[0]


@given(
    share=st.floats(0.01, 0.99),
    score=st.sampled_from(sorted({*SCORES} - {"random"})),
    neurons=st.integers(2, 40),
    parts=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_threshold_leaves_the_wanted_share_below(
    share: float, score: str, neurons: int, parts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        rows_of(
            torch.randn(7, neurons, generator=generator),
            torch.randn(7, neurons, generator=generator),
            torch.rand(1, neurons, generator=generator) + 0.5,
        )
        for _ in range(parts)
    ]
    counts = ScoreCounts(score, 0, 1)
    for part in rows:
        counts(part)
    (threshold,) = counts.thresholds(share, neurons)
    values = np.sort(torch.cat([score_rows(score, part) for part in rows]).flatten().numpy())
    wanted = 1 - kept_neurons(share, neurons) / neurons
    # The first that is to stay, and what is counted together with it.
    first = values[min(round(wanted * values.size), values.size - 1)]
    assert threshold < first
    assert threshold >= first - abs(first) * 2**-8 - 1e-12
    kept = torch.cat([Cutter(score, (threshold,))(part) for part in rows])
    assert (
        int(kept.sum()) == (values > threshold).sum() >= values.size - round(wanted * values.size)
    )


def test_zeros_need_not_stay() -> None:
    gate = torch.tensor([[-1.0, -2.0, -3.0, 4.0]])
    rows = Rows(gate, gate, gate.relu() * gate, torch.relu, None, lambda: torch.ones(1, 1))
    counts = ScoreCounts("abs_activation", 0, 1)
    counts(rows)
    (threshold,) = counts.thresholds(0.5, 4)
    assert threshold == 0
    assert Cutter("abs_activation", (threshold,))(rows).tolist() == [[False, False, False, True]]


def test_what_the_model_leaves_out_stays_out() -> None:
    gate, own = torch.tensor([[1.0, 5.0, 3.0, 2.0]]), torch.tensor([[True, False, True, True]])
    rows = rows_of(gate, gate, torch.ones(1, 1), own)
    counts = ScoreCounts("abs_gate", 0, 1)
    counts(rows)
    # It is the lowest already: half of the neurons are it and the smallest of the others.
    assert Cutter("abs_gate", counts.thresholds(0.5, 4))(rows).tolist() == [
        [False, False, True, True]
    ]


def test_an_expert_may_have_a_threshold_of_its_own() -> None:
    gate = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [5.0, 6.0, 7.0, 8.0]])
    one = torch.ones(3)
    rows = Rows(
        gate, gate, gate * gate, torch.relu, None, lambda: torch.ones(1, 1), None,
        ExpertRows(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), one),
    )  # fmt: skip
    each, together = ScoreCounts("abs_gate", 3, 2), ScoreCounts("abs_gate", 3, 1)
    each(rows)
    together(rows)
    half, whole = each.thresholds(0.5, 4), together.thresholds(0.5, 4)
    assert 4 < half[0] < 5
    assert 20 < half[1] < 30
    assert Cutter("abs_gate", half)(rows).sum(dim=-1).tolist() == [0, 2, 4]
    assert 6 < whole[0] < 7
    assert Cutter("abs_gate", whole)(rows).sum(dim=-1).tolist() == [0, 4, 2]
    lonely = ScoreCounts("abs_gate", 3, 3)
    lonely(rows)
    with pytest.raises(ValueError, match="no token of it reached expert 2 of layer 3"):
        lonely.thresholds(0.5, 4)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama", "mixtral"])
def test_a_contribution_is_the_norm_of_what_a_neuron_adds_to_its_layer(name: str) -> None:
    model = random_model(name)
    places = [place for layer in engine_of(model).layers for place in layer]
    tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    chosen = None
    if places[0].target == "routed":
        chosen = torch.tensor([[3, 1], [0, 2], [2, 1]])
    rows = seen(places[0], tokens, chosen)
    assert rows.down is not None
    scores = score_rows("contribution", rows)
    for neuron in range(0, rows.gate_TF.shape[1], 5):
        alone = torch.zeros_like(rows.hidden_TF)
        alone[:, neuron] = rows.hidden_TF[:, neuron]
        added = rows.down(alone)
        if rows.routed is not None:
            added = added * rows.routed.weight_T.unsqueeze(-1)
        torch.testing.assert_close(scores[:, neuron], added.norm(dim=-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["layer", "expert"])
def test_plans_keep_what_is_above_and_say_how_much_came(of: str, tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    text, other = random_text(), random_text(windows=9, seed=1)
    calibration = calibration_of(model, text, tmp_path)
    plans = calibration.threshold_plans(["abs_activation", "wina"], [0.0, 0.5, 0.75], of)
    assert list(plans) == [(s, p) for s in ("abs_activation", "wina") for p in (0.5, 0.75)]
    engine = engine_of(model)
    # On the text itself it is what was wanted, as far as buckets tell.
    for (_, share), plan in plans.items():
        made = plan.made
        assert made is not None
        (cut, *_) = made.choices
        assert isinstance(cut, Cut)
        assert len(cut.thresholds[0]) == (4 if of == "expert" else 1)
        ((_, on_text),) = engine.measure([plan], text, ignore)
        # Layers after the first see what pruned ones give: they are near, not equal.
        first = tallies_json(on_text.tallies[:1])
        assert Use.of(first, 1).pruned == pytest.approx(share, abs=0.01)
        ((_, elsewhere),) = engine.measure([plan], other, ignore)
        use = Use.of(tallies_json(elsewhere.tallies), 1)
        assert use.pruned == pytest.approx(share, abs=0.2)
        assert use.activated == pytest.approx((1 + 2 * (1 - use.pruned)) / 3)


def test_a_cut_at_nothing_is_the_model() -> None:
    model = random_model("qwen3_moe")
    text = random_text()
    engine = engine_of(model)
    nothing = tuple(Cut("abs_activation", ((-1.0,),)) for _ in range(3))
    everything = tuple(Cut("abs_activation", ((1e9,),)) for _ in range(3))
    plans = [
        Plan("abs_activation", (0.0,) * 3, Made("threshold", "", choices))
        for choices in (nothing, everything)
    ]
    assert plans[0].key() != plans[1].key()
    (_, kept), (_, gone) = engine.measure(plans, text, ignore)
    plain = engine_of(model).measure([Plan("none", (0.0,) * 3)], text, ignore)
    assert kept.perplexity.loss.value == next(iter(plain))[1].perplexity.loss.value
    assert Use.of(tallies_json(kept.tallies), 1) == Use(0.0, 1.0)
    assert Use.of(tallies_json(gone.tallies), 1) == Use(1.0, pytest.approx(1 / 3))
