"""Each tensor keeps the dtype it is stored in, or the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file, save_file
from test_export import export_run, open_run
from test_import import import_model
from torch import Tensor

from mone_megatron.hf.checks import check_import
from mone_megatron.hf.dtypes import describe_dtypes, main_dtype
from mone_megatron.hf.importing import plan_import
from mone_megatron.hf.weights import open_weights

_FILE = "model.safetensors"
Change = Callable[[str, Tensor], Tensor]


def save_with(name: str, folder: Path, tokenizer: Path, change: Change) -> dict[str, Tensor]:
    """Saves a model with each of its tensors changed, and returns them."""
    save_model(name, folder, tokenizer)
    weights = {key: change(key, tensor) for key, tensor in load_file(folder / _FILE).items()}
    save_file(weights, folder / _FILE, metadata={"format": "pt"})
    return weights


def bf16_but(*ends: str) -> Change:
    """All tensors in bf16 but those whose names end so, which are fp32 that bf16 cannot hold."""
    return lambda key, tensor: tensor if key.endswith(ends) else tensor.bfloat16()


# Model, how its tensors are stored, and which of ours are then fp32.
MIXED: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "fp32 routers": ("qwen3_moe", bf16_but("mlp.gate.weight"), ("router.weight",)),
    "fp32 norms": (
        "olmoe",
        bf16_but("norm.weight"),
        ("layernorm.weight",),
    ),
    # Ours holds them in one tensor with others: the wider dtype holds all of them.
    "one fp32 projection": (
        "llama",
        bf16_but("layers.1.self_attn.k_proj.weight"),
        ("layers.1.self_attention.linear_qkv.weight",),
    ),
    "one fp32 expert": (
        "mixtral",
        bf16_but("layers.2.block_sparse_moe.experts.3.w2.weight"),
        ("layers.2.mlp.experts.down_weight",),
    ),
    "fp32 shared gate and head": (
        "qwen2_moe",
        bf16_but("shared_expert_gate.weight", "lm_head.weight"),
        ("gate_weight", "output_layer.weight"),
    ),
}


@pytest.mark.parametrize("case", MIXED)
def test_each_tensor_keeps_its_dtype(case: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    name, change, fp32 = MIXED[case]
    theirs = save_with(name, tmp_path / "hf", tokenizer_dir, change)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "ours")
    found = check_import(checkpoint, tmp_path / "hf", choices=True)
    assert found.holds, found.describe()
    source = open_run(checkpoint)
    for ours, info in source.weights.items():
        wanted = torch.float32 if ours.endswith(fp32) else torch.bfloat16
        assert info.dtype is wanted, ours
    assert source.dtype is torch.bfloat16
    export_run(source, tmp_path / "back")
    back = load_file(tmp_path / "back" / _FILE)
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        # Wider where ours is one tensor with an fp32 one, never narrower; the same values.
        assert torch.promote_types(back[key].dtype, tensor.dtype) is back[key].dtype
        assert torch.equal(back[key].float(), tensor.float()), key
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_in_fp16_stays_so(tmp_path: Path, tokenizer_dir: Path) -> None:
    theirs = save_with("qwen3", tmp_path / "hf", tokenizer_dir, lambda key, tensor: tensor.half())
    checkpoint = import_model(tmp_path / "hf", tmp_path / "ours")
    found = check_import(checkpoint, tmp_path / "hf", choices=True)
    assert found.holds, found.describe()
    export_run(open_run(checkpoint), tmp_path / "back")
    back = load_file(tmp_path / "back" / _FILE)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_a_dtype_that_was_asked_for(
    wanted: torch.dtype, tmp_path: Path, tokenizer_dir: Path
) -> None:
    save_with("qwen3_moe", tmp_path / "hf", tokenizer_dir, bf16_but("gate.weight", "o_proj.weight"))
    checkpoint = import_model(tmp_path / "hf", tmp_path / "ours", dtype=wanted)
    assert {info.dtype for info in open_run(checkpoint).weights.values()} == {wanted}
    found = check_import(checkpoint, tmp_path / "hf", choices=True, dtype=wanted)
    assert found.holds, found.describe()
    rounded = check_import(checkpoint, tmp_path / "hf", choices=True).holds
    assert rounded is (wanted is torch.float32)


def test_the_line_names_what_is_not_like_the_rest(tmp_path: Path, tokenizer_dir: Path) -> None:
    save_with("qwen3_moe", tmp_path / "hf", tokenizer_dir, bf16_but("gate.weight"))
    path = tmp_path / "hf" / "config.json"
    told = {}
    for says in ("bfloat16", "float16"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": says}))
        with open_weights(tmp_path / "hf") as weights:
            told[says] = plan_import(tmp_path / "hf", weights).describe_dtypes(weights)
    gates = ", ".join(f"model.layers.{layer}.mlp.gate.weight" for layer in range(3))
    assert told["bfloat16"] == f"bfloat16; float32 in {gates}"
    assert told["float16"].endswith("(config.json says float16, which is not what is stored)")
    many = {str(number): torch.float32 for number in range(5)} | {"x": torch.float16}
    assert describe_dtypes(many, torch.float16) == "float16; float32 in 0, 1, 2 and 2 more"
    assert main_dtype([(torch.float32, 3), (torch.float16, 2), (torch.float16, 2)]) is torch.float16


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int8, "I8"),
        (torch.float64, "F64"),
        (torch.uint8, "U8"),
    ],
)
def test_quantised_tensors_are_refused_by_name(
    dtype: torch.dtype, told: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    save_with(
        "llama",
        tmp_path / "hf",
        tokenizer_dir,
        lambda key, tensor: tensor.to(dtype) if key == name else tensor,
    )
    with pytest.raises(ValueError, match=f"{name} is stored as {told}, which is not read; convert"):
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_quantised_model_is_refused_by_its_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    save_model("llama", tmp_path / "hf", tokenizer_dir)
    path = tmp_path / "hf" / "config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quantization_config: weights quantised by fp8 are not"):
        import_model(tmp_path / "hf", tmp_path / "ours")
