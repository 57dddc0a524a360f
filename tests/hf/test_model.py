"""The exported model's class as people use transformers models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import VOCABULARY
from mone_models import VARIANTS, build
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mone_megatron.config.schema import ModelConfig, MoNEConfig
from mone_megatron.hf import MoneForCausalLM
from mone_megatron.hf.experts_mone import NeuronSettings
from mone_megatron.hf.export import AUTO_MAP, write_code


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_a_cache_and_with_padding(variant: str) -> None:
    model, prompt = build(variant), tokens(1, 9)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, **settings), alone)
    # Beside a longer prompt, with padding on the left.
    batch = torch.cat([torch.nn.functional.pad(prompt, (4, 0)), tokens(1, 13)])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    both = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(both[0, 4:], alone[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_it_is_the_same(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is MoneForCausalLM
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 8)).logits, model(tokens(2, 8)).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(variant: str) -> None:
    plain, checkpointed = build(variant).train(), build(variant).train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    for (name, ours), theirs in zip(
        plain.named_parameters(), checkpointed.parameters(), strict=True
    ):
        assert ours.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name


def test_router_logits_and_their_balance_loss() -> None:
    output = build("plain")(tokens(2, 8), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(16, 4)] * 2
    assert output.aux_loss > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_can_be_recorded_is(variant: str) -> None:
    model = build(variant)
    model.set_attn_implementation("eager")
    wanted = {f"output_{kind}": True for kind in ("attentions", "hidden_states", "router_logits")}
    output = model(tokens(2, 8), **wanted)
    assert [tuple(layer.shape) for layer in output.attentions] == [(2, 4, 8, 8)] * 2
    for layer in output.attentions:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(2, 4, 8))
        assert not layer.triu(diagonal=1).any()
    assert [tuple(layer.shape) for layer in output.hidden_states] == [(2, 8, 32)] * 3
    assert len(output.router_logits) == 2 - len(model.config.mlp_only_layers)
    # Step by step with a cache, too: one query over all that came before it.
    generated = model.generate(
        tokens(1, 5),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    shapes = [[tuple(layer.shape) for layer in step] for step in generated.attentions]
    assert shapes == [[(1, 4, 5, 5)] * 2, [(1, 4, 1, 6)] * 2, [(1, 4, 1, 7)] * 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_implementations_and_caches_agree(variant: str) -> None:
    model, prompt = build(variant), tokens(2, 9)
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(prompt, use_cache=False).logits
            cached = model(prompt, use_cache=True)
        assert cached.past_key_values.get_seq_length() == 9
        assert torch.equal(cached.logits, logits[implementation])
    torch.testing.assert_close(logits["eager"], logits["sdpa"])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    grown = model.generate(prompt, **settings)
    fixed = model.generate(prompt, cache_implementation="static", **settings)
    assert torch.equal(grown, fixed)


def test_lora_and_trainer(tmp_path: Path) -> None:
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    model = get_peft_model(build("plain"), adapters)
    frozen = model.base_model.model.model.layers[0].mlp.experts.down_proj
    before = frozen.detach().clone()
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        learning_rate=0.05,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3, losses
    assert torch.equal(frozen, before)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


_ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mone_megatron", "megatron"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__
tokens = torch.load(sys.argv[2])
torch.save(model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0), sys.argv[3])
"""


def test_it_loads_alone_with_the_code_beside_it(tmp_path: Path) -> None:
    model = build("all")
    folder = tmp_path / "export"
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(folder)
    settings = NeuronSettings.from_config(model.config.mone)
    write_code(
        folder, MoNEConfig(keep_ratio=settings.keep_ratio, score=settings.score), ModelConfig()
    )
    torch.save(tokens(1, 6), tmp_path / "tokens.pt")
    arguments = [str(folder), str(tmp_path / "tokens.pt"), str(tmp_path / "out.pt")]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", _ALONE, *arguments], check=True, cwd=tmp_path, env=environment
    )
    expected = model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_an_export_invites_no_replacement_of_its_experts() -> None:
    assert set(AUTO_MAP) == {"AutoConfig", "AutoModelForCausalLM"}


def test_eager_experts_are_refused() -> None:
    model = build("plain")
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="does not select neurons"):
        model(tokens(1, 4))
