"""Pruning in every architecture: against enable_mone, against the definition, and undone."""

from __future__ import annotations

import pytest
import torch
from hf_models import ALL, DENSE, MOES, VOCABULARY, random_model
from sparsify_helpers import engine_of, ignore, losses, random_text
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from mone_megatron.hf import MoneConfig, MoneForCausalLM, enable_mone
from mone_megatron.lab.sparsification.places import (
    check_definable,
    choose_targets,
    compute_all_neurons,
    decoder_layers,
    places_of,
)
from mone_megatron.lab.sparsification.plans import SCORES, dense, plan, uniform


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", ALL)
def test_nothing_pruned_is_the_model_before_and_after(name: str) -> None:
    model = random_model(name)
    before = logits(model)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    engine = engine_of(model)
    count = len(engine.layers)
    with engine.pruning(dense(count)):
        assert torch.equal(logits(model), before)
    for score in SCORES:
        with engine.pruning(uniform(score, 0.75, count)):
            assert not torch.equal(logits(model), before), score
    # Kept whole, too, when there is something to look at the rows.
    engine.observe(random_text(), (0.5,), ignore)
    assert torch.equal(logits(model), before)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_looking_at_rows_changes_nothing() -> None:
    for name in ("mixtral", "llama"):
        model = random_model(name)
        before = logits(model)
        (place,) = places_of(decoder_layers(model)[1], ("routed", "dense"))
        with place.attached(lambda rows: None):
            assert torch.equal(logits(model), before), name


@pytest.mark.parametrize("name", MOES)
def test_a_share_of_three_quarters_is_a_keep_ratio_of_one_quarter(name: str) -> None:
    model, mone = random_model(name), random_model(name)
    for score in ("abs_activation", "abs_gate", "signed_gate", "abs_product"):
        enable_mone(mone, keep_ratio=0.25, score=score)
        engine = engine_of(model)
        with engine.pruning(uniform(score, 0.75, len(engine.layers))):
            assert torch.equal(logits(model), logits(mone)), score


@pytest.mark.parametrize("name", DENSE)
def test_dense_mlps_are_pruned_by_the_definition(name: str) -> None:
    model, reference = random_model(name), random_model(name)
    for layer in decoder_layers(reference):
        mlp = layer.mlp

        def forward(hidden: Tensor, mlp: nn.Module = mlp) -> Tensor:
            activation = mlp.act_fn(mlp.gate_proj(hidden))
            kept = activation.abs().topk(12, dim=-1).indices
            mask = torch.zeros_like(activation).scatter(-1, kept, 1.0)
            return mlp.down_proj(activation * mlp.up_proj(hidden) * mask)

        mlp.forward = forward
    engine = engine_of(model)
    with engine.pruning(uniform("abs_activation", 0.75, len(engine.layers))):
        assert torch.equal(logits(model), logits(reference))


def test_layers_and_kinds_that_are_not_asked_for_stay() -> None:
    model = random_model("deepseek_v2")
    assert [place.target for layer in engine_of(model).layers for place in layer] == ["routed"] * 2
    everything = engine_of(model, "routed", "shared", "dense")
    kinds = [[place.target for place in layer] for layer in everything.layers]
    assert [sorted(layer) for layer in kinds] == [["dense"], *[["routed", "shared"]] * 2]
    plain = logits(model)
    for targets in (("routed",), ("shared",), ("dense",)):
        engine = engine_of(model, *targets)
        shares = [0.0, 0.0, 0.0]
        with engine.pruning(plan("abs_activation", shares)):
            assert torch.equal(logits(model), plain)
        # The first layer has no experts, the others nothing else.
        shares[0] = 0.9
        with engine.pruning(plan("abs_activation", shares)):
            assert torch.equal(logits(model), plain) == (targets != ("dense",))


def mone_model() -> MoneForCausalLM:
    torch.manual_seed(3)
    config = MoneConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        initializer_range=0.2,
        eos_token_id=None,
        mone={"keep_ratio": 0.25, "apply_to": ["routed", "shared", "dense"]},
    )
    return MoneForCausalLM(config).eval()


def test_pruning_goes_on_where_a_model_of_ours_selects() -> None:
    model = mone_model()
    selecting = logits(model)
    kinds = ("routed", "shared", "dense")
    for score in SCORES:
        engine = engine_of(model, *kinds)
        # It has left out three quarters itself: whatever the score, they are gone first.
        with engine.pruning(uniform(score, 0.75, 2)):
            assert torch.equal(logits(model), selecting), score
        with engine.pruning(uniform(score, 0.9, 2)):
            assert not torch.equal(logits(model), selecting), score
    compute_all_neurons(model)
    whole = logits(model)
    assert not torch.equal(whole, selecting)
    engine = engine_of(model, *kinds)
    with engine.pruning(uniform("abs_activation", 0.75, 2)):
        assert torch.equal(logits(model), selecting)
    with engine.pruning(uniform("abs_activation", 0.5, 2)):
        assert not torch.equal(logits(model), selecting)
    assert torch.equal(logits(model), whole)


def test_random_neurons_depend_on_the_seed_alone() -> None:
    text, model = random_text(), random_model("qwen3_moe")
    engine = engine_of(model)
    half = uniform("random", 0.5, 3)
    first, between, again = losses(engine, [half, uniform("random", 0.2, 3), half], text)
    assert first == again
    assert between != first
    engine._seed = 4
    assert losses(engine, [half], text) != [first]


def test_neurons_that_are_dead_cost_nothing() -> None:
    model = random_model("qwen3_moe")
    with torch.no_grad():
        for layer in decoder_layers(model):
            # gate_up_proj is [experts, gate then up, hidden]; SiLU(0) is 0.
            layer.mlp.experts.gate_up_proj[:, 3:11] = 0
    engine = engine_of(model)
    plans = [dense(3), *(uniform("abs_activation", share, 3) for share in (0.2, 0.5, 0.6))]
    none, some, all_dead, more = losses(engine, plans, random_text())
    assert none == some == all_dead
    assert more != none


def test_one_neuron_that_carries_everything_goes_last_and_first_from_below() -> None:
    model, without = random_model("mixtral"), random_model("mixtral")
    with torch.no_grad():
        for layer in decoder_layers(model):
            experts = layer.mlp.experts
            alone = experts.gate_up_proj[:, 7].clone()
            experts.gate_up_proj[:, :48] = 0
            experts.gate_up_proj[:, 7] = alone
        for layer in decoder_layers(without):
            layer.mlp.experts.down_proj.zero_()
    engine, text = engine_of(model), random_text()
    plans = [uniform("abs_activation", 0.99, 3), uniform("bottom_k", 0.03, 3)]
    none, last, first = losses(engine, [dense(3), *plans], text)
    assert last == none
    assert [first] == losses(engine_of(without), [dense(3)], text)


def tiny(model_type: str, **settings: object) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(model_type, **sizes | settings)
    return AutoModelForCausalLM.from_config(config).eval()


def test_experts_with_a_gate_of_their_own_are_pruned_by_what_they_define() -> None:
    model = tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    engine = engine_of(model)
    places = engine.layers[0]
    for score in ("abs_activation", "wina_activation", "bottom_k"):
        with pytest.raises(ValueError, match=f"{score} needs .a., and these experts"):
            check_definable(places, [score])
    plain = logits(model)
    for score in ("abs_gate", "signed_gate", "abs_product", "wina", "random"):
        check_definable(places, [score])
        with engine.pruning(uniform(score, 0.5, 1)):
            assert not torch.equal(logits(model), plain), score
    enable_mone(model, keep_ratio=0.5, score="abs_product")
    expected = logits(model)
    model.set_experts_implementation("grouped_mm")
    with engine.pruning(uniform("abs_product", 0.5, 1)):
        assert torch.equal(logits(model), expected)


class _Doubled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(2 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no decoder layers of the usual kind"):
        choose_targets(tiny("gpt2", n_embd=32, n_layer=1, n_head=4), None)
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM has no experts .* and no MLP"):
        choose_targets(tiny("phi3", pad_token_id=0), None)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed neurons, only dense"):
        choose_targets(random_model("llama"), ("routed",))
    with pytest.raises(ValueError, match="has no shared neurons, only routed"):
        choose_targets(random_model("mixtral"), ("routed", "shared"))
    model = random_model("llama")
    decoder_layers(model)[0].mlp.__class__ = _Doubled
    engine = engine_of(model)
    with (
        pytest.raises(ValueError, match="_Doubled computes something other than"),
        engine.pruning(uniform("abs_gate", 0.5, 3)),
    ):
        logits(model)
