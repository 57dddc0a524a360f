"""The check that ends conversions: right models pass at any scale, any one fault is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file, save_file
from test_import import import_model
from torch import Tensor

from mone_megatron.hf.checks import check_import
from mone_megatron.hf.importing import Upcycling
from mone_megatron.hf.verify import LARGEST, TYPICAL, compare

Change = Callable[[dict[str, Tensor]], None]


def change_weights(folder: Path, change: Change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def scaled(factor: float) -> Change:
    """Logits so many times as large."""
    return lambda weights: weights.update(
        {"model.norm.weight": weights["model.norm.weight"] * factor}
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize(
    ("name", "upcycling"),
    [("qwen3", Upcycling(4, 2)), ("qwen3_moe", None), ("deepseek_v2_lite", None)],
)
def test_a_right_model_passes_whatever_its_logits_are(
    name: str, upcycling: Upcycling | None, factor: float, tmp_path: Path, tokenizer_dir: Path
) -> None:
    folder = save_model(name, tmp_path / "hf", tokenizer_dir)
    change_weights(folder, scaled(factor))
    checkpoint = import_model(folder, tmp_path / "ours", upcycling)
    found = check_import(checkpoint, folder, choices=upcycling is None)
    assert found.holds, found.describe()
    # Of 1e3 the difference in logits is far above any that one would think of as rounding.
    worst = float((found.largest_C * found.scale_C).max())
    assert (worst > 1e-4) is (factor > 1)


def swapped(one: str, other: str) -> Change:
    return lambda weights: weights.update(
        {one: weights[other].clone(), other: weights[one].clone()}
    )


def _permute_one_neuron(weights: dict[str, Tensor]) -> None:
    gate = weights["model.layers.2.mlp.experts.3.gate_proj.weight"]
    gate[[3, 5]] = gate[[5, 3]]


def _transpose(weights: dict[str, Tensor]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = weights[name].T.contiguous()


def change_settings(folder: Path, changes: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


_HEADS = {"head_dim": 8, "num_key_value_heads": 4}
# Model, its settings, what is done to it after it was imported.
FAULTS: dict[str, tuple[str, dict[str, object], Change]] = {
    "one neuron of one expert": ("qwen3_moe", {}, _permute_one_neuron),
    "two norms": (
        "qwen3_moe",
        {},
        swapped(
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.post_attention_layernorm.weight",
        ),
    ),
    "gate and up of one expert": (
        "mixtral",
        {},
        swapped(
            "model.layers.0.block_sparse_moe.experts.1.w1.weight",
            "model.layers.0.block_sparse_moe.experts.1.w3.weight",
        ),
    ),
    "a square matrix transposed": ("llama", _HEADS, _transpose),
    "two experts": (
        "deepseek_v2_lite",
        {},
        swapped(
            "model.layers.2.mlp.experts.0.down_proj.weight",
            "model.layers.2.mlp.experts.3.down_proj.weight",
        ),
    ),
}
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "epsilon": ("llama", {"rms_norm_eps": 1e-5}),
    "epsilon with experts": ("qwen3_moe", {"rms_norm_eps": 1e-5}),
    "frequency": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}),
}


# A bound in logits would let all of them through: they are a thousandth of what they were.
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_refused_however_small_the_logits(
    fault: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    name, shape, change = FAULTS[fault]
    folder = save_model(name, tmp_path / "hf", tokenizer_dir, **shape)
    change_weights(folder, scaled(1e-3))
    checkpoint = import_model(folder, tmp_path / "ours")
    change_weights(folder, change)
    found = check_import(checkpoint, folder, choices=True)
    assert not found.holds
    assert found.describe().startswith("the two models differ: ")


@pytest.mark.parametrize("fault", SETTINGS)
def test_a_wrong_setting_is_refused(fault: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    name, changes = SETTINGS[fault]
    folder = save_model(name, tmp_path / "hf", tokenizer_dir)
    checkpoint = import_model(folder, tmp_path / "ours")
    change_settings(folder, changes)
    found = check_import(checkpoint, folder, choices=True)
    # Small, but of all tokens alike.
    assert not found.holds
    assert "at half of the tokens" in found.describe()


def test_each_bound_is_told_with_its_numbers() -> None:
    theirs = torch.randn(4, 8, 50, generator=torch.Generator().manual_seed(1)) * 7
    assert compare(theirs, theirs, [], []).holds
    one = theirs.clone()
    one[2, 3, 4] += 7 * 2e-3
    line = compare(one, theirs, [], []).describe()
    assert "at one token logits differ by 2." in line
    assert "(allowed 1e-03)" in line
    assert "half" not in line
    all_of_them = theirs * (1 + 2 * TYPICAL)
    line = compare(all_of_them, theirs, [], []).describe()
    assert "at half of the tokens logits differ by more than 6.0e-05 of their scale" in line
    assert "at one token" not in line
    assert compare(theirs * (1 + TYPICAL / 2), theirs, [], []).holds
    assert TYPICAL < LARGEST


def test_no_number_that_is_not_finite_passes() -> None:
    theirs = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for wrong in (torch.nan, torch.inf):
        ours = theirs.clone()
        ours[1, 2, 3] = wrong
        assert not compare(ours, theirs, [], []).holds
        assert not compare(theirs, ours, [], []).holds
    nothing = torch.zeros(2, 4, 8)
    assert compare(nothing, nothing, [], []).holds
    assert not compare(theirs, nothing, [], []).holds
