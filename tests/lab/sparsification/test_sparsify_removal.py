"""Experts and neurons that go: by brute force, and by what is left."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_models import MOES, random_model
from sparsify_helpers import calibration_of, engine_of, ignore, losses, random_text
from test_sparsify_truncation import layer_inputs
from torch import Tensor
from transformers import PreTrainedModel

from mone_megatron.lab.sparsification.calibration import Calibration
from mone_megatron.lab.sparsification.granularity import Remover
from mone_megatron.lab.sparsification.places import ExpertsPlace
from mone_megatron.lab.sparsification.plans import (
    ExpertsGone,
    ExpertsSkipped,
    LayerChoice,
    Made,
    NeuronsGone,
    Plan,
    dense,
)
from mone_megatron.lab.sparsification.ranking import packed
from mone_megatron.lab.sparsification.removal import (
    kept_for_good,
    least_experts,
    skipping,
    super_experts,
)
from mone_megatron.lab.sparsification.use import Use, tallies_json

TEXT = random_text()


def made(*choices: LayerChoice | None) -> Plan:
    return Plan("none", (0.5,) * len(choices), Made("test", "", choices))


def use_under(model: PreTrainedModel, plan: Plan) -> Use:
    ((_, found),) = engine_of(model).measure([plan], TEXT, ignore)
    return Use.of(tallies_json(found.tallies), 0)


def routed(model: PreTrainedModel, number: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts, as Qwen3-MoE has them."""
    gate = model.model.layers[number].mlp.gate
    weights, chosen = F.softmax(tokens @ gate.weight.T, dim=-1).topk(gate.top_k)
    return weights / weights.sum(dim=-1, keepdim=True), chosen


def hidden_of(model: PreTrainedModel, number: int, expert: int, tokens: Tensor) -> Tensor:
    experts = model.model.layers[number].mlp.experts
    gate, up = (tokens @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("name", sorted(MOES))
def test_without_experts_is_a_model_that_never_had_them(name: str) -> None:
    """The router's rows are taken out by hand, and so are the experts' weights."""
    gone = (1,)
    model, smaller = random_model(name), random_model(name)
    places = [place for layer in engine_of(smaller, "routed").layers for place in layer]
    for place in places:
        assert isinstance(place, ExpertsPlace)
        left = [expert for expert in range(4) if expert not in gone]
        experts, router = place.module, place._router()
        for weights in (experts, router):
            for key, parameter in list(weights.named_parameters(recurse=False)):
                if len(parameter) == 4:
                    setattr(weights, key, torch.nn.Parameter(parameter[left].detach()))
        experts.num_experts = router.num_experts = 3
    engine = engine_of(model, "routed")
    choices = [ExpertsGone(gone) if layer else None for layer in engine.layers]
    (found,) = losses(engine, [made(*choices)], TEXT)
    (expected,) = losses(engine_of(smaller, "routed"), [dense(3)], TEXT)
    assert found == pytest.approx(expected, rel=1e-6)
    # And nothing stays of it.
    assert losses(engine, [dense(3)], TEXT) == losses(
        engine_of(random_model(name)), [dense(3)], TEXT
    )


def test_fewer_experts_than_a_token_has_are_fewer_of_them() -> None:
    model = random_model("qwen3_moe")
    assert use_under(model, made(*[ExpertsGone((0, 2, 3))] * 3)) == Use(0.5, 0.5)
    assert use_under(model, made(*[ExpertsGone((3,))] * 3)) == Use(0.0, 1.0)


def test_a_router_that_chooses_by_more_than_logits_is_refused() -> None:
    model = random_model("qwen3_moe")
    for layer in model.model.layers:
        gate = layer.mlp.gate
        stubborn = lambda hidden, gate=gate: (  # noqa: E731
            hidden, torch.ones(len(hidden), 2) / 2, torch.tensor([[0, 1]]).repeat(len(hidden), 1),
        )  # fmt: skip
        gate.forward = stubborn
    with pytest.raises(ValueError, match="chooses experts by more than their logits"):
        losses(engine_of(model), [made(*[ExpertsGone((1,))] * 3)], TEXT)


@torch.no_grad()
def test_statistics_by_hand(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    remover = Remover(calibration_of(model, TEXT, tmp_path), 0, print)
    statistics = remover.statistics
    for number in range(3):
        tokens = layer_inputs(model, TEXT, number)
        weights, chosen = routed(model, number, tokens)
        found = statistics[number, 0]
        for expert in range(4):
            hers = (chosen == expert).any(dim=-1)
            p = weights[chosen == expert]
            hidden = hidden_of(model, number, expert, tokens[hers])
            down = model.model.layers[number].mlp.experts.down_proj[expert]
            output = hidden @ down.T
            assert found.tokens_E[expert] == hers.sum()
            torch.testing.assert_close(
                found.saliency_E[expert].float(), (p * output.norm(dim=-1)).mean()
            )
            torch.testing.assert_close(found.largest_E[expert], output.abs().max())
            expected = (p.unsqueeze(-1) * hidden.abs() * down.norm(dim=0)).sum(dim=0)
            torch.testing.assert_close(found.neurons_EF[expert].float(), expected)
    (plan,) = remover.plans(["reap"], [0.0, 0.5])
    assert plan.plan.made is not None
    for number, choice in enumerate(plan.plan.made.choices):
        saliency = statistics[number, 0].saliency_E
        assert choice == ExpertsGone(tuple(sorted(saliency.argsort()[:2].tolist())))
    assert plan.held == 0.5


def test_least_and_kept() -> None:
    assert least_experts(torch.tensor([3.0, 1.0, 2.0, 1.0]), 1) == (3,)
    assert least_experts(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2) == (1, 3)
    kept = kept_for_good(torch.tensor([[1.0, 5.0, 5.0, 2.0], [9.0, 0.0, 1.0, 1.0]]), 0.5)
    assert kept.tolist() == [[False, True, True, False], [True, False, True, False]]


@torch.no_grad()
def test_naee_finds_the_best_set_of_all(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    remover = Remover(calibration_of(model, TEXT, tmp_path), 0, print)
    (plan,) = remover.plans(["naee"], [0.5])
    assert plan.plan.made is not None
    for number in range(3):
        mlp = model.model.layers[number].mlp
        tokens = layer_inputs(model, TEXT, number)
        whole = mlp(tokens.unsqueeze(0))[0]
        changes = {}
        for gone in combinations(range(4), 2):
            logits = tokens @ mlp.gate.weight.T
            logits[:, list(gone)] = -torch.inf
            weights, chosen = F.softmax(logits, dim=-1).topk(2)
            output = torch.zeros_like(tokens)
            for slot in range(2):
                for token in range(len(tokens)):
                    expert = int(chosen[token, slot])
                    hidden = hidden_of(model, number, expert, tokens[token])
                    output[token] += weights[token, slot] * mlp.experts.down_proj[expert] @ hidden
            changes[gone] = float((output - whole).norm())
        assert plan.plan.made.choices[number] == ExpertsGone(min(changes, key=changes.__getitem__))


def test_skipping_by_hand() -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    found = skipping(weights, 0.5)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 1 / 3, 0.0], [0.4, 0.35, 0.25]]))
    torch.testing.assert_close(skipping(weights, 1.0), torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    torch.testing.assert_close(skipping(weights, 0.0), weights)


@torch.no_grad()
def test_the_wanted_share_of_experts_is_skipped(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    told: list[str] = []
    remover = Remover(calibration_of(model, TEXT, tmp_path), 0, told.append)
    (plan,) = remover.plans(["naee_skip"], [0.25, 0.75])
    # One of a token's two experts stays.
    (line,) = told
    assert "a share of 0.75 is left out, 0.5 is the most" in line
    assert plan.plan.made is not None
    for number in range(3):
        weights, _ = routed(model, number, layer_inputs(model, TEXT, number))
        ratios = weights[:, 1] / weights[:, 0]
        # Of two experts a token, a quarter of all is half of the second ones: the paper's median.
        choice = plan.plan.made.choices[number]
        assert isinstance(choice, ExpertsSkipped)
        assert float((ratios < choice.beta).float().mean()) == pytest.approx(0.5, abs=0.02)
    use = use_under(model, plan.plan)
    assert use.pruned == pytest.approx(0.25, abs=0.05)
    assert use.activated == pytest.approx(1 - use.pruned)
    assert plan.held == 1


def test_ways_that_need_the_same_statistics_share_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    watch = Calibration.watch
    monkeypatch.setattr(
        Calibration, "watch", lambda self, *what: (passes.append(what[1]), watch(self, *what))[1]
    )
    remover = Remover(calibration_of(random_model("qwen3_moe"), TEXT, tmp_path), 0, print)
    assert len(remover.plans(["neurons", "reap", "super_experts"], [0.5])) == 4
    assert passes == ["outputs of experts and neurons"]


def test_neurons_that_are_gone_are_zeros_in_the_weights(tmp_path: Path) -> None:
    model, smaller = random_model("mixtral"), random_model("mixtral")
    remover = Remover(calibration_of(model, TEXT, tmp_path), 0, print)
    (plan,) = remover.plans(["neurons"], [0.75])
    statistics = remover.statistics
    assert plan.plan.made is not None
    with torch.no_grad():
        for number, layer in enumerate(smaller.model.layers):
            kept = kept_for_good(statistics[number, 0].neurons_EF, 0.75)
            assert kept.sum(dim=-1).tolist() == [12] * 4
            assert plan.plan.made.choices[number] == NeuronsGone((packed(kept),))
            layer.mlp.experts.down_proj *= kept.unsqueeze(1)
    (found,) = losses(engine_of(model), [plan.plan], TEXT)
    (expected,) = losses(engine_of(smaller), [dense(3)], TEXT)
    assert found == pytest.approx(expected, rel=1e-6)
    assert use_under(model, plan.plan) == Use(0.75, 0.25)
    assert plan.held == 0.25


def test_super_experts_have_outliers() -> None:
    generator = np.random.default_rng(0)
    largest = generator.uniform(1, 2, (4, 100))
    largest[1, 7], largest[3, 50] = 500.0, 900.0
    assert super_experts(largest.tolist()) == [(1, 7), (3, 50)]
    # Above the percentile, and not near the largest.
    largest[2, 3] = 60.0
    assert super_experts(largest.tolist()) == [(1, 7), (3, 50)]


def test_as_many_others_go_beside_super_experts(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 1000
    remover = Remover(calibration_of(model, TEXT, tmp_path), 0, print)
    found, others = remover.plans(["super_experts"], [])
    assert (found.way, found.experts) == ("super_experts", ((1, 2),))
    assert others.way == "other_experts"
    ((layer, expert),) = others.experts
    assert layer == 1
    assert expert != 2
    assert found.held == others.held == pytest.approx(11 / 12)
    assert found.share == pytest.approx(1 / 12)
    assert use_under(model, found.plan) == Use(0.0, 1.0)
