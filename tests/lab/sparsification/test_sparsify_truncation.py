"""CETT and PPL-p%, by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_models import random_model
from sparsify_helpers import calibration_of, engine_of, ignore, random_text
from torch import Tensor
from transformers import PreTrainedModel

from mone_megatron.evaluation.evaluate import perplexity_scores
from mone_megatron.evaluation.harness import Score
from mone_megatron.evaluation.perplexity import Perplexity
from mone_megatron.lab.sparsification.engine import Text
from mone_megatron.lab.sparsification.plans import Cut, Plan, dense
from mone_megatron.lab.sparsification.truncation import (
    ErrorCurve,
    Truncator,
    cett_plan,
    error_curves,
)
from mone_megatron.lab.sparsification.use import Use


def layer_inputs(model: PreTrainedModel, text: Text, number: int) -> Tensor:
    """What the MLP of a layer reads of a text, ``[N, H]``."""
    seen: list[Tensor] = []
    mlp = model.model.layers[number].mlp
    handle = mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in text.batches():
            model(torch.stack([torch.from_numpy(window) for window in batch])[:, :-1])
    handle.remove()
    return torch.cat(seen)


def added_by_neurons(model: PreTrainedModel, number: int, token: Tensor) -> Tensor:
    """What each neuron adds to the output of a layer for one token, ``[neurons, H]``."""
    mlp = model.model.layers[number].mlp
    if not hasattr(mlp, "experts"):
        hidden = F.silu(mlp.gate_proj(token)) * mlp.up_proj(token)
        return hidden.unsqueeze(-1) * mlp.down_proj.weight.T
    probabilities = F.softmax(mlp.gate.weight @ token, dim=-1)
    weights, chosen = probabilities.topk(mlp.gate.top_k)
    parts = []
    for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
        gate, up = (mlp.experts.gate_up_proj[expert] @ token).chunk(2)
        added = (F.silu(gate) * up).unsqueeze(-1) * mlp.experts.down_proj[expert].T
        parts.append(weight * added)
    return torch.cat(parts)


def true_error(model: PreTrainedModel, number: int, tokens: Tensor, threshold: float) -> float:
    """The mean over tokens of ||sum of the tail|| / ||output||."""
    errors = []
    for token in tokens:
        added = added_by_neurons(model, number, token)
        tail = added[added.norm(dim=-1) <= threshold].sum(dim=0)
        errors.append(float(tail.norm() / added.sum(dim=0).norm()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_errors_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    model, text = random_model(name), random_text(windows=3)
    calibration = calibration_of(model, text, tmp_path)
    curves = error_curves(calibration)
    assert [len(layer) for layer in curves] == [1, 1, 1]
    for number, (curve,) in enumerate(curves):
        tokens = layer_inputs(model, text, number)
        assert curve.errors[0] == 0
        assert curve.errors[-1] > 0.5
        for place in (5, 20, 39):
            expected = true_error(model, number, tokens, curve.thresholds[place])
            assert curve.errors[place] == pytest.approx(expected, rel=1e-3)
        # The largest threshold of those tried whose error is allowed; the next is not.
        found = curve.threshold_at(0.2)
        assert true_error(model, number, tokens, found) <= 0.2
        after = curve.thresholds[curve.thresholds.index(found) + 1]
        assert true_error(model, number, tokens, after) > 0.2
    # Known the second time.
    assert error_curves(calibration) == curves


def test_a_curve_that_dips_is_not_followed_past_its_first_error() -> None:
    curve = ErrorCurve((0.0, 1.0, 2.0, 3.0), (0.0, 0.3, 0.1, 0.5))
    assert curve.threshold_at(0.2) == 0
    assert curve.threshold_at(0.3) == 2
    assert curve.threshold_at(0.9) == 3


def own_text(model: PreTrainedModel, windows: int, length: int) -> Text:
    """What a model says itself, so that it gets worse at it when something is taken away."""
    tokens = torch.arange(windows).unsqueeze(-1)
    with torch.no_grad():
        for _ in range(length):
            following = model(tokens).logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=-1)
    return Text("own", list(tokens.numpy()), None, 4, None)


def test_ppl_p_is_the_most_that_keeps_the_perplexity(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    text = own_text(model, 9, 16)
    calibration = calibration_of(model, text, tmp_path)
    engine = engine_of(model)
    known: dict[Plan, Perplexity] = {}

    def measure(plans: Sequence[Plan], on: Text) -> dict[Plan, tuple[Score, ...]]:
        todo = [each for each in plans if each not in known]
        known.update((each, found.perplexity) for each, found in engine.measure(todo, on, ignore))
        return {each: tuple(perplexity_scores(on.name, known[each])) for each in plans}

    truncator = Truncator(calibration, text, measure, lambda plan: Use(0.5, 0.5))
    curves = error_curves(calibration)
    fixed, found = truncator.truncations([0.3], [1.0])
    assert (fixed.asked, fixed.rise, fixed.cett) == (0.3, None, 0.3)
    assert (found.asked, found.rise) == (None, 1.0)
    # By the definition, of a plain exponential of the losses.
    nothing = known[dense(3)].perplexity.value
    for one in (fixed, found):
        at = known[cett_plan(curves, one.cett)].perplexity.value
        assert one.measured == pytest.approx(100 * (at / nothing - 1), abs=1e-6)
        assert one.measured == one.calibrated
    assert found.measured <= 1.0
    # A layer that truncates a step more is too much.
    steps = sorted({error for layer in curves for curve in layer for error in curve.errors})
    following = cett_plan(curves, next(step for step in steps if step > found.cett + 0.001))
    measure([following], text)
    assert 100 * (known[following].perplexity.value / nothing - 1) > 1.0
    cut = cett_plan(curves, found.cett).at(0)
    assert isinstance(cut, Cut)
    assert cut.thresholds == ((found.thresholds[0][0],),)
