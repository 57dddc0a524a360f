"""``mone_sparse``: the same text as ``mone``, from the rows of kept neurons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import MOES, VOCABULARY, random_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mone_megatron.hf import decode_mone, enable_mone
from mone_megatron.hf.decode_mone import MONE_SPARSE, speeds_up
from mone_megatron.hf.generation import choose_experts
from mone_megatron.methods.scores import SCORES

PROMPT = torch.tensor([[5, 9, 100, 7, 33]])
# Eager attention computes a token alone and among others the same to the last bits.
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """These layers are too small for it to pay."""
    monkeypatch.setattr(decode_mone, "OVERHEAD_BYTES", 0)


class Counter:
    """Counts the calls that read rows, and their tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        original = decode_mone.sparse_experts

        def counted(tokens: torch.Tensor, *rest: object) -> torch.Tensor:
            self.tokens.append(len(tokens))
            return original(tokens, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(decode_mone, "sparse_experts", counted)


@pytest.mark.parametrize("name", MOES)
def test_generates_what_mone_generates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(name)
    # Scores that need the down projection as a whole are computed as mone computes them.
    scores = [score.name for score in SCORES if "down_norm" not in score.reads]
    score = scores[list(MOES).index(name) % len(scores)]
    enable_mone(model, keep_ratio=0.25, score=score)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(PROMPT, **settings)
    counter = Counter(monkeypatch)
    model.set_experts_implementation(MONE_SPARSE)
    generated = model.generate(PROMPT, **settings)
    # One token at a time, in all steps but the prompt's.
    assert counter.tokens.count(1) >= 9
    assert torch.equal(generated.sequences, expected.sequences)
    for ours, theirs in zip(generated.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_after_it_the_model_saves_and_trains_as_before(tmp_path: Path) -> None:
    model, untouched = random_model("qwen3_moe"), random_model("qwen3_moe")
    for each in (model, untouched):
        enable_mone(each, keep_ratio=0.25)
    model.set_experts_implementation(MONE_SPARSE)
    model.generate(PROMPT, **GREEDY)
    losses = []
    for each in (model, untouched):
        loss = each(PROMPT, labels=PROMPT).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for name, each in (("ours", model), ("theirs", untouched)):
        each.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert files[0] == files[1]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), PreTrainedModel)


def test_large_batches_are_computed_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("qwen3_moe")
    enable_mone(model, keep_ratio=0.25)
    tokens = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        counter = Counter(monkeypatch)
        model.set_experts_implementation(MONE_SPARSE)
        assert torch.equal(model(tokens).logits, expected)
    assert counter.tokens == []


def test_only_models_that_select_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("mixtral")
    assert not speeds_up(model, 2)
    enable_mone(model, keep_ratio=0.9)
    assert not speeds_up(model, 2)
    enable_mone(model, keep_ratio=0.5)
    assert speeds_up(model, 2)
    assert not speeds_up(random_model("llama"), 2)
    # Three matrices a layer, half of the experts; half of two of the three is saved.
    experts = model.model.layers[0].mlp.experts
    saved = experts.down_proj.numel() * 4
    assert choose_experts(model, "auto") == MONE_SPARSE
    monkeypatch.setattr(decode_mone, "OVERHEAD_BYTES", saved / 2 - 1)
    assert speeds_up(model, 2)
    monkeypatch.setattr(decode_mone, "OVERHEAD_BYTES", saved / 2 + 1)
    assert not speeds_up(model, 2)
    assert choose_experts(model, "auto") == "as the model has them"


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=16, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def test_experts_with_a_gate_of_their_own_are_refused() -> None:
    model = gpt_oss()
    enable_mone(model, keep_ratio=0.25, score="abs_gate")
    assert not speeds_up(model, 2)
    model.set_experts_implementation(MONE_SPARSE)
    with pytest.raises(ValueError, match=r"mone_sparse: .*Experts computes its gate.*use mone"):
        model.generate(PROMPT, **GREEDY)


def test_without_settings_it_says_what_to_call() -> None:
    model = random_model("mixtral")
    model.set_experts_implementation(MONE_SPARSE)
    with pytest.raises(ValueError, match="enable_mone"), torch.no_grad():
        model(PROMPT)
    assert isinstance(model, nn.Module)


def test_selection_is_not_chosen_for_a_model_without_settings() -> None:
    with pytest.raises(ValueError, match=r"--experts: mone selects neurons.*use auto"):
        choose_experts(random_model("mixtral"), "mone")
    with pytest.raises(ValueError, match=r"--experts: .* has no experts to compute by grouped_mm"):
        choose_experts(random_model("llama"), "grouped_mm")
    assert choose_experts(random_model("mixtral"), "batched_mm") == "batched_mm"
