"""Thresholds, histograms and mass of activations that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hf_models import random_model
from hypothesis import given
from hypothesis import strategies as st
from sparsify_helpers import engine_of, ignore, random_text

from mone_megatron.lab.sparsification.places import decoder_layers
from mone_megatron.lab.sparsification.ranking import Rows
from mone_megatron.lab.sparsification.statistics import LayerStatistics, Observer

# Half a bucket.
CLOSE = 2.0**-11


def observed(values: torch.Tensor, tops: tuple[float, ...], parts: int = 1) -> LayerStatistics:
    """Statistics of activations ``[T, F]``, seen in some parts."""
    observer = Observer(0, "routed", values.shape[1], torch.device("cpu"))
    for part in values.chunk(parts):
        observer(Rows(part, part, part, lambda gate: gate, None, torch.Tensor))
    return observer.statistics(tops, len(values))


def silu(value: float) -> float:
    return value / (1 + math.exp(-value))


def test_a_model_with_known_thresholds() -> None:
    model = random_model("llama", mlp_bias=True)
    generator = torch.Generator().manual_seed(2)
    gates = torch.rand(3, 48, generator=generator) * 6 - 3
    with torch.no_grad():
        for layer, gate in zip(decoder_layers(model), gates, strict=True):
            # The gate projection is its bias, whatever the token.
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.gate_proj.bias.copy_(gate)
    text = random_text()
    found = engine_of(model).observe(text, (0.25, 0.5, 1.0), ignore)
    assert [entry.layer for entry in found] == [0, 1, 2]
    for entry, gate in zip(found, gates, strict=True):
        expected = sorted((abs(silu(float(value))) for value in gate), reverse=True)
        assert (entry.tokens, entry.rows, entry.neurons) == (text.tokens, text.tokens, 48)
        for threshold, rank in zip(entry.thresholds, (12, 24, 48), strict=True):
            assert threshold.pooled == pytest.approx(expected[rank - 1], rel=CLOSE)
            assert threshold.per_token == pytest.approx(expected[rank - 1], rel=1e-5)
        mass = np.cumsum(expected) / np.sum(expected)
        np.testing.assert_allclose(entry.mass, mass, rtol=1e-5)
        np.testing.assert_allclose(entry.ranks, np.arange(1, 49) / 48)
        negative = int((gate < 0).sum())
        assert sum(entry.negative) == negative * text.tokens
        assert sum(entry.positive) == (48 - negative) * text.tokens


def test_thresholds_are_exact_for_bf16() -> None:
    # The published ones are bf16 numbers; these are neighbours of them.
    values = torch.tensor([[0.0515137, 0.0517578, 0.2421875, 0.2431641]]).bfloat16()
    found = observed(values, (0.25, 0.5, 0.75, 1.0))
    expected = sorted(values.flatten().tolist(), reverse=True)
    assert [one.pooled for one in found.thresholds] == expected


@given(
    values=st.lists(
        st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), min_size=1, max_size=12
    ),
    top=st.floats(0.01, 1),
    parts=st.integers(1, 3),
)
def test_a_threshold_is_the_quantile(values: list[list[float]], top: float, parts: int) -> None:
    rows = torch.tensor(values)
    found = observed(rows, (top,), parts)
    ordered = rows.abs().flatten().sort(descending=True).values
    wanted = float(ordered[max(1, round(top * len(ordered))) - 1])
    lowest = 2.0**-44
    assert found.thresholds[0].pooled <= max(wanted, lowest) * (1 + 1e-6)
    assert found.thresholds[0].pooled >= wanted * (1 - CLOSE) or wanted < lowest
    assert sum(found.positive) + sum(found.negative) == rows.numel()
    assert found == observed(rows, (top,)) or parts > 1
    assert LayerStatistics.from_json(found.to_json()) == found


def test_a_histogram_has_every_value_in_its_bin() -> None:
    values = torch.tensor([[0.26, -0.26, 1.0, 3.9, -0.001, 2.0]])
    found = observed(values, (0.5,))
    edges = np.array(found.edges)
    assert len(edges) == len(found.positive) + 1
    for sign, counts in ((1, found.positive), (-1, found.negative)):
        expected, _ = np.histogram(sign * values.numpy(), edges)
        assert list(counts) == expected.tolist()
    # Eight bins to a doubling.
    assert edges[8] == pytest.approx(2 * edges[0])


def test_mass_of_rows_without_any() -> None:
    found = observed(torch.tensor([[0.0, 0.0], [3.0, -1.0]]), (1.0,))
    assert found.mass == pytest.approx((0.375, 0.5))


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 0: activations that are not finite"):
        observed(torch.tensor([[1.0, math.nan]]), (0.5,))
    with pytest.raises(ValueError, match="no token reached its routed neurons"):
        Observer(0, "routed", 2, torch.device("cpu")).statistics((0.5,), 1)
