"""What replaces experts or MLPs of a model that selects is refused by name, not obeyed silently."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from hf_models import VOCABULARY, random_model
from mone_models import build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from mone_megatron.hf import MoneForCausalLM, enable_mone, modeling_mone
from mone_megatron.hf.modeling_mone import AllHeadsRMSNorm

EVERYWHERE = {
    "mlp_only_layers": [0],
    "shared_expert_intermediate_size": 24,
    "mone": {"keep_ratio": 0.25, "apply_to": ["routed", "shared", "dense"]},
}
TOKENS = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))


class Fused(nn.Module):
    """Another engine's experts: they keep all neurons, or here, do nothing."""

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return hidden_states


def fused_forward(self: nn.Module, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    return x


def replace_experts(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.experts = Fused()


def replace_block(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = Fused()


def replace_dense(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp = Fused()


def replace_shared(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.shared_expert = Fused()


def patch_experts(model: PreTrainedModel) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.forward = fused_forward.__get__(experts)


def patch_dense(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.forward = fused_forward.__get__(model.model.layers[0].mlp)


def quantize_experts(model: PreTrainedModel) -> None:
    settings = FineGrainedFP8Config(weight_block_size=(16, 16))
    replace_with_fp8_linear(model, ["lm_head", "self_attn"], settings)


FUSED = r"replaced by test_hf_guard\.Fused, which does not select"
PATCHED = r"computed by test_hf_guard\.fused_forward, which does not select"


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (replace_experts, rf"MoneModel\.layers\.1\.mlp\.experts: {FUSED}"),
        (replace_block, rf"MoneModel\.layers\.1\.mlp\.experts: {FUSED}"),
        (replace_dense, rf"MoneModel\.layers\.0\.mlp: {FUSED}"),
        (replace_shared, rf"MoneModel\.layers\.1\.mlp\.shared_expert: {FUSED}"),
        (patch_experts, f"MoneExperts: {PATCHED}"),
        (patch_dense, f"MoneMLP: {PATCHED}"),
        (quantize_experts, r"experts: replaced by .*FP8Experts, which does not select"),
    ],
)
def test_replacements_in_an_export(
    replace: Callable[[PreTrainedModel], None], message: str
) -> None:
    model = build("plain", **EVERYWHERE)
    replace(model)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(TOKENS)


def test_experts_that_keep_all_neurons_may_be_computed_by_anything() -> None:
    for settings in ({"mone": None}, {"mone": {"keep_ratio": 0.25, "apply_to": ["dense"]}}):
        model = build("plain", **settings)
        replace_experts(model)
        with torch.no_grad():
            assert model(TOKENS).logits.isfinite().all()
        enable_mone(model, keep_ratio=0.25)
        with pytest.raises(ValueError, match=FUSED), torch.no_grad():
            model(TOKENS)


def test_replaced_experts_in_a_block_alone() -> None:
    block = build("plain").model.layers[0].mlp
    block.experts = Fused()
    with pytest.raises(ValueError, match=f"^experts: {FUSED}"):
        block(torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (replace_experts, rf"model\.layers\.1\.mlp\.experts: {FUSED}"),
        (replace_block, rf"model\.layers\.1\.mlp\.experts: {FUSED}"),
        (patch_experts, f"Qwen3MoeExperts: {PATCHED}"),
        (quantize_experts, r"experts: replaced by .*FP8Experts, which does not select"),
    ],
)
def test_replacements_in_a_stock_model(
    replace: Callable[[PreTrainedModel], None], message: str
) -> None:
    model = random_model("qwen3_moe")
    enable_mone(model, keep_ratio=0.25)
    replace(model)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(TOKENS)


def test_a_class_replaced_while_the_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' register_patch_mapping does in exports, for the time of from_pretrained."""

    class Other(Fused):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(1, 1, 1))
            self.down_proj = nn.Parameter(torch.zeros(1, 1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(modeling_mone, "MoneExperts", Other)
        model = build("plain")
    with pytest.raises(ValueError, match=r"replaced by .*Other, which does not select"):
        model(TOKENS)


def test_wrappers_and_copies_are_no_replacements() -> None:
    model = build("plain", **EVERYWHERE)
    with torch.no_grad():
        expected = model(TOKENS).logits
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(same(TOKENS).logits, expected)
        adapters = LoraConfig(
            target_modules=["q_proj", "gate_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            modules_to_save=["lm_head"],
        )
        adapted = get_peft_model(model, adapters)
        torch.testing.assert_close(adapted(TOKENS).logits, expected)


def test_adapters_of_experts_are_what_merging_them_gives() -> None:
    model = build("plain", **EVERYWHERE)
    adapters = LoraConfig(
        target_modules=["gate_proj", "down_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    adapted = get_peft_model(model, adapters)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        beside = adapted(TOKENS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, beside, rtol=1e-4, atol=1e-4)
    assert isinstance(merged, MoneForCausalLM)


def test_offloaded_layers_and_exported_programs_select_the_same() -> None:
    model, offloaded = build("plain", **EVERYWHERE), build("plain", **EVERYWHERE)
    with torch.no_grad():
        expected = model(TOKENS).logits
        accelerate.cpu_offload(offloaded, execution_device="cpu")
        assert torch.equal(offloaded(TOKENS).logits, expected)
        program = torch.export.export(model, (TOKENS,), {"use_cache": False})
        torch.testing.assert_close(program.module()(TOKENS, use_cache=False).logits, expected)


def test_settings_reach_every_target_of_an_export_and_no_other() -> None:
    model, routed_only = build("plain", **EVERYWHERE), build("plain", **EVERYWHERE)
    enable_mone(routed_only, keep_ratio=0.25)
    with torch.no_grad():
        everywhere = model(TOKENS).logits
        assert (routed_only(TOKENS).logits - everywhere).abs().max() > 1e-2
        enable_mone(model, keep_ratio=0.25, apply_to=("shared", "dense"))
        elsewhere = model(TOKENS).logits
        # Routed experts then keep all neurons, by any implementation.
        for name in ("grouped_mm", "mone_sparse"):
            model.set_experts_implementation(name)
            torch.testing.assert_close(model(TOKENS).logits, elsewhere)
        enable_mone(routed_only, keep_ratio=0.25, apply_to=("routed", "shared", "dense"))
        assert torch.equal(routed_only(TOKENS).logits, everywhere)


def test_a_stock_model_selects_in_routed_experts_only() -> None:
    with pytest.raises(ValueError, match=r"mone.apply_to: Qwen2MoeForCausalLM .* not in shared"):
        enable_mone(random_model("qwen2_moe"), keep_ratio=0.5, apply_to=("routed", "shared"))


def test_a_saved_stock_model_selects_when_it_is_loaded_again(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    enable_mone(model, keep_ratio=0.25)
    for turn in ("once", "twice"):
        model.save_pretrained(tmp_path / turn)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        with torch.no_grad():
            assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
        model = again


def test_computing_all_neurons_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build("plain")
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        model(TOKENS)
    assert "'batched_mm' computes all neurons of the routed experts" in caplog.text


def test_the_norm_over_all_heads_is_no_kernels_norm() -> None:
    """Hub kernels replace the forward of every class that has, or inherits, a name of theirs."""
    assert not issubclass(AllHeadsRMSNorm, Qwen3MoeRMSNorm)
    norms = [each for each in build("all").modules() if isinstance(each, AllHeadsRMSNorm)]
    assert norms
    heads = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    ours = norms[0](heads)
    expected = torch.nn.functional.rms_norm(heads.flatten(-2), (32,), norms[0].weight, 1e-6)
    torch.testing.assert_close(ours, expected.view_as(heads))


def test_a_compiled_model_is_the_eager_one_and_refuses_replaced_experts() -> None:
    model = build("plain", **EVERYWHERE)
    with torch.no_grad():
        expected = model(TOKENS).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS).logits, expected)
        replace_experts(model)
        with pytest.raises(Exception, match=r"test_hf_guard\.Fused, which does not select"):
            torch.compile(model, backend="eager")(TOKENS)
