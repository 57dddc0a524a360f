"""Neuron selection through transformers' experts interface, against loops over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hf_models import MOES, VOCABULARY, random_model
from mone_models import build
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mone_megatron.hf import NeuronSettings, enable_mone
from mone_megatron.hf.experts_mone import MONE_BATCHED, TARGETS
from mone_megatron.methods.scores import SCORES


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def by_hand(experts: torch.nn.Module, kept: int, score: str) -> list[object]:
    """Replace an experts module's forward by the definition: token by token, expert by expert."""
    seen: list[object] = []

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for expert, weight in zip(index[token], weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                activation = F.silu(gate)
                norm = experts.down_proj[expert].norm(dim=0)
                ranked = {
                    "abs_activation": activation.abs(),
                    "abs_gate": gate.abs(),
                    "signed_gate": gate,
                    "abs_product": (activation * up).abs(),
                    "wina": (activation * up).abs() * norm,
                    "wina_activation": activation.abs() * norm,
                }[score]
                neurons = sorted(range(len(gate)), key=lambda k: (-float(ranked[k]), k))[:kept]
                for neuron in neurons:
                    term = activation[neuron] * up[neuron] * experts.down_proj[expert][:, neuron]
                    output[token] += weight * term
        seen.append(None)
        return output

    experts.forward = forward
    return seen


@pytest.mark.parametrize("name", MOES)
def test_selection_is_the_definition(name: str) -> None:
    model, reference = random_model(name), random_model(name)
    score = SCORES.names[list(MOES).index(name) % len(SCORES)]
    enable_mone(model, keep_ratio=0.25, score=score)
    calls = []
    for module in reference.modules():
        if hasattr(module, "_is_expert_parallel"):
            kept = round(0.25 * module.intermediate_dim)
            calls.append(by_hand(module, kept, score))
    with torch.no_grad():
        expected = reference(tokens()).logits
        assert calls
        assert all(calls)
        torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-5, rtol=1e-5)
        model.set_experts_implementation(MONE_BATCHED)
        torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-5, rtol=1e-5)
        # And it makes a difference that can be undone.
        model.set_experts_implementation("grouped_mm")
        assert (model(tokens()).logits - expected).abs().max() > 1e-2


def test_all_neurons_is_the_plain_model() -> None:
    model = random_model("qwen3_moe")
    with torch.no_grad():
        plain = model(tokens()).logits
        enable_mone(model, keep_ratio=1.0)
        assert torch.equal(model(tokens()).logits, plain)


def test_gradients_reach_kept_neurons_only() -> None:
    model = random_model("mixtral")
    enable_mone(model, keep_ratio=1 / 48)
    one = torch.tensor([[5]])
    model(one).logits.sum().backward()
    experts = model.model.layers[-1].mlp.experts
    used = experts.down_proj.grad.abs().sum(dim=1).ne(0).sum(dim=-1)
    assert sorted(used.tolist()) == [0, 0, 1, 1]  # two experts of the token, one neuron in each


def test_settings_are_saved_with_the_model(tmp_path: object) -> None:
    model = random_model("olmoe")
    enable_mone(model, keep_ratio=0.5, score="abs_gate")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mone")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def tiny(model_type: str, **settings: object) -> PreTrainedModel:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | settings))


def test_a_gate_of_its_own_needs_a_score_that_is_defined() -> None:
    model = tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    enable_mone(model, keep_ratio=0.5)
    with pytest.raises(
        ValueError, match="one of the scores abs_gate, abs_product, signed_gate, wina"
    ):
        model(torch.tensor([[1, 2]]))
    enable_mone(model, keep_ratio=0.5, score="abs_product")
    with torch.no_grad():
        half = model(torch.tensor([[1, 2]])).logits
        model.set_experts_implementation("grouped_mm")
        assert not torch.equal(model(torch.tensor([[1, 2]])).logits, half)


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        enable_mone(tiny("llama"), keep_ratio=0.5)


def test_selecting_without_settings_is_refused() -> None:
    model = random_model("mixtral")
    model.set_experts_implementation("mone")
    with pytest.raises(ValueError, match=r"call mone_megatron.hf.enable_mone"):
        model(tokens())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0.0}, "mone.keep_ratio: 0.0 is not in"),
        ({"keep_ratio": 0.5, "score": "size"}, "mone.score: 'size' is unknown"),
        ({"keep_ratio": 0.5, "apply_to": ["router"]}, "mone.apply_to: 'router' is not one of"),
        ({"keep_ratio": 0.5, "ratio": 1}, "config.mone: .* is not understood"),
        (
            {"keep_ratio": 0.5, "rule": "n_of_m", "rule_options": {"n": 2}},
            "mone.rule_options.n: mone.rule=n_of_m has no such option; it has m",
        ),
        (
            {"keep_ratio": 0.5, "rule": "blocks", "rule_options": {"size": True}},
            "mone.rule_options.size: True is no int; give one such as 16",
        ),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronSettings.from_config(settings)


def test_settings_go_through_json() -> None:
    settings = NeuronSettings(0.125, "signed_gate", TARGETS)
    assert NeuronSettings.from_config(settings.to_config()) == settings


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("routed", "mone.rule_options.m: 12 does not divide 16 neurons"),
        ("shared", "mone.rule_options.m: 16 does not divide 24 neurons"),
        ("dense", "mone.rule_options.m: 32 does not divide 48 neurons"),
    ],
)
def test_a_budget_that_the_rule_cannot_keep_is_named_at_load(target: str, message: str) -> None:
    settings = {
        "keep_ratio": 0.5,
        "apply_to": [target],
        "rule": "n_of_m",
        "rule_options": {"m": int(message.split()[1])},
    }
    with pytest.raises(ValueError, match=message):
        build(
            "plain",
            mlp_only_layers=[0],
            shared_expert_intermediate_size=24,
            mone=settings,
        )
