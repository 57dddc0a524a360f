"""Runs of several layouts to Hugging Face and back, bitwise; logits against the training model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_import import import_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from mone_megatron.checkpoint.tensors import different_tensors
from mone_megatron.hf import checks, export
from mone_megatron.hf.architectures import Architecture
from mone_megatron.hf.export import Exported
from mone_megatron.hf.loading import load_model
from mone_megatron.hf.source import Source, open_source
from mone_megatron.testing.launch import run_layouts

_QUICK = [
    "device=cpu",
    "train.steps=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "model.num_layers=2",
    # Fewer rows than the padded embedding has, and wider weights than would flatter a comparison.
    "model.vocab_size=600",
    "model.init_std=0.2",
    "checkpoint.interval=2",
    "logging.report=false",
    "logging.wandb.mode=disabled",
]
_SHARED = ["model.shared_expert_ffn_hidden_size=48", "mone.apply_to=[routed,shared,dense]"]
_ODD = ["model.expert_ffn_hidden_size=72", "mone.keep_ratio=0.4"]
# Name -> (processes, overrides, architecture it is exported as).
RUNS: dict[str, tuple[int, list[str], str]] = {
    "baseline_ep2": (2, ["experiment=tiny_moe", "parallel.expert=2"], "qwen3_moe"),
    "mone_tp2": (
        2,
        [
            "experiment=tiny_mone",
            "parallel.tensor=2",
            "parallel.expert_tensor=2",
            "model.first_dense_layers=1",
            "model.qkv_bias=true",
            "model.shared_expert_gate=true",
            *_SHARED,
            *_ODD,
        ],
        "mone",
    ),
    "mone_pp2_tied": (
        2,
        [
            "experiment=tiny_mone",
            "parallel.pipeline=2",
            # Which lie otherwise where it is compared, on one process.
            "megatron.transformer.num_layers_in_first_pipeline_stage=1",
            "model.tie_embeddings=true",
            "model.activation=relu2",
            "model.router.score_function=sigmoid",
            "model.router.expert_bias=true",
            "model.router.balance=[none]",
            "model.router.balance_coeff=[0]",
            "model.router.scaling_factor=2.5",
            "mone.score=abs_product",
        ],
        "mone",
    ),
    "mone_wina": (
        2,
        [
            "experiment=tiny_mone",
            "parallel.expert=2",
            "mone.score=wina",
            "model.first_dense_layers=1",
            *_SHARED,
        ],
        "mone",
    ),
    "mone_ep4": (4, ["experiment=tiny_mone", "parallel.expert=4", *_ODD], "mone"),
    "mone_bf16": (
        1,
        [
            "experiment=tiny_mone",
            "device.dtype=bf16",
            "model.router.score_function=sigmoid",
            "model.router.expert_bias=true",
        ],
        "mone",
    ),
    "dense": (1, ["experiment=tiny_moe", "model.num_experts=0"], "qwen3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2, 4):
        jobs = {
            name: [*overrides, *_QUICK]
            for name, (count, overrides, _) in RUNS.items()
            if count == processes
        }
        run_layouts(jobs, processes=processes, folder=folder)
    return folder


def open_run(folder: Path) -> Source:
    return open_source(folder, say=lambda message: None)


def export_run(
    source: Source,
    output: Path,
    *,
    architecture: str = "auto",
    dtype: str = "saved",
    shard_bytes: int = 10**9,
    check: Callable[[Path], str] = lambda folder: "not checked",
) -> Exported:
    chosen: Architecture = export.choose_architecture(source, architecture)
    return export.export(
        source,
        output,
        architecture=chosen,
        dtype=export.export_dtype(dtype),
        shard_bytes=shard_bytes,
        check=check,
        progress=lambda message: None,
    )


@pytest.mark.parametrize("name", RUNS)
def test_round_trip_is_bitwise_and_logits_agree(name: str, runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / name)
    exported = export_run(source, tmp_path / "hf")
    assert exported.architecture.model_type == RUNS[name][2]
    found = checks.check_export(source, tmp_path / "hf", dtype=None)
    assert found.holds, found.describe()
    if "mone" in name:
        assert found.masks > 1000
        assert found.equal_masks > 0.999 * found.masks
    back = open_run(import_model(tmp_path / "hf", tmp_path / "back"))
    names = source.weights.keys()
    assert back.weights.keys() == names
    assert different_tensors(source.reader, back.reader, iter(names)) == []
    assert back.vocab_size == source.vocab_size


def test_a_baseline_needs_no_code_of_ours(runs: Path, tmp_path: Path) -> None:
    export_run(open_run(runs / "baseline_ep2"), tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model) is Qwen3MoeForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not list((tmp_path / "hf").glob("*.py"))
    # Expert by expert, as other programs read checkpoints of the Hub.
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as weights:
        assert "model.layers.0.mlp.experts.7.down_proj.weight" in set(weights.keys())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0


def test_shards_hold_what_the_index_says(runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / "mone_ep4")
    export_run(source, tmp_path / "one")
    exported = export_run(source, tmp_path / "many", shard_bytes=100_000)
    index = json.loads((tmp_path / "many" / export.INDEX_NAME).read_text(encoding="utf-8"))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == exported.bytes
    assert set(index["weight_map"].values()) == {path.name for path in files}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    parts = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_in_memory_it_is_what_the_export_loads_as(runs: Path, tmp_path: Path) -> None:
    for name in ("baseline_ep2", "mone_pp2_tied"):
        export_run(open_run(runs / name), tmp_path / name)
        ours, theirs = (load_model(str(where)) for where in (runs / name, tmp_path / name))
        assert type(ours.model) is type(theirs.model)
        weights = theirs.model.state_dict()
        assert weights.keys() == ours.model.state_dict().keys()
        for key, tensor in ours.model.state_dict().items():
            assert torch.equal(tensor, weights[key]), key
        assert (
            ours.tokenizer("import os")["input_ids"] == theirs.tokenizer("import os")["input_ids"]
        )


@pytest.mark.parametrize(
    ("run", "dtype", "other"),
    [("mone_ep4", "bf16", "fp32"), ("mone_bf16", "fp32", "bf16"), ("mone_bf16", "fp16", "fp32")],
)
def test_rounding_that_was_asked_for_is_no_difference(
    run: str, dtype: str, other: str, runs: Path, tmp_path: Path
) -> None:
    source = open_run(runs / run)
    export_run(source, tmp_path / "hf", dtype=dtype)
    wanted = export.export_dtype(dtype)
    found = checks.check_export(source, tmp_path / "hf", dtype=wanted)
    assert found.holds, found.describe()
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            bias = name.endswith("e_score_correction_bias")
            assert weights.get_tensor(name).dtype is (torch.float32 if bias else wanted), name
    # Another dtype than it was written in is one.
    found = checks.check_export(source, tmp_path / "hf", dtype=export.export_dtype(other))
    assert not found.holds


def test_weights_that_the_wanted_dtype_cannot_hold_are_named(runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / "mone_bf16")
    read = source.reader.read

    def large(name: str, row: int | None = None) -> torch.Tensor:
        tensor: torch.Tensor = read(name, row)
        return tensor * 1e5 if name == "decoder.final_layernorm.weight" else tensor

    source.reader.read = large  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"model.norm.weight holds .* not finite in float16"):
        export_run(source, tmp_path / "hf", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


def test_another_dtype(runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / "mone_ep4")
    export_run(source, tmp_path / "hf", dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype is torch.bfloat16
    saved = source.reader.read("decoder.layers.0.self_attention.linear_proj.weight")
    written = model.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(written, saved.to(torch.bfloat16))


def test_the_card_tells_what_it_is(runs: Path, tmp_path: Path) -> None:
    export_run(open_run(runs / "mone_tp2"), tmp_path / "hf", check=lambda folder: "all is well")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    recipe = (tmp_path / "hf" / "training_config.yaml").read_text(encoding="utf-8")
    for words in (
        "keep ratio 0.4 by abs_activation in routed, shared, dense MLPs",
        "| steps trained | 2 |",
        "Checked at export: all is well.",
        "trust_remote_code=True",
        "| loss |",
    ):
        assert words in card
    # What names places on the machine that trained it stays there.
    assert "keep_ratio: 0.4" in recipe
    assert str(tmp_path.parent) not in card + recipe
    assert "run:" not in recipe


def test_a_failed_check_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    def refuse(folder: Path) -> str:
        assert (folder / "config.json").is_file()
        raise ValueError("logits differ")

    with pytest.raises(ValueError, match="logits differ"):
        export_run(open_run(runs / "dense"), tmp_path / "hf", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="is there already"):
        export_run(open_run(runs / "dense"), tmp_path / "hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine"]


@pytest.mark.parametrize(
    ("run", "wanted", "message"),
    [
        ("mone_ep4", "qwen3_moe", r"cannot hold this model \(mone=True\); use mone"),
        ("baseline_ep2", "mixtral", r"cannot hold this model \(qk_norm=head\); use qwen3_moe"),
        ("baseline_ep2", "gpt5", "'gpt5' is not auto or one of"),
    ],
)
def test_an_architecture_that_cannot_hold_it_is_refused(
    runs: Path, run: str, wanted: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export.choose_architecture(open_run(runs / run), wanted)


def test_any_model_fits_our_own_class(runs: Path, tmp_path: Path) -> None:
    source = open_run(runs / "baseline_ep2")
    export_run(source, tmp_path / "hf", architecture="mone")
    found = checks.check_export(source, tmp_path / "hf", dtype=None)
    assert found.holds, found.describe()


def test_weights_that_no_training_leaves_are_named(runs: Path, tmp_path: Path) -> None:
    good = torch.randn(3, 4, 4)
    export.check_values("w", good)
    dead = good.clone()
    dead[1] = 0
    with pytest.raises(ValueError, match=r"experts.down_proj, expert 1, is all zero"):
        export.check_values("experts.down_proj", dead)
    with pytest.raises(ValueError, match="w is all zero"):
        export.check_values("w", torch.zeros(4, 4))
    with pytest.raises(ValueError, match="w holds values that are not finite"):
        export.check_values("w", good.masked_fill(good > 1, torch.nan))
    export.check_values("bias", torch.zeros(4))


def test_a_verification_sees_one_wrong_expert(runs: Path, tmp_path: Path) -> None:
    """The check that ends an export, tried on an export that is wrong."""
    source = open_run(runs / "baseline_ep2")
    export_run(source, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[[2, 5]] = model.model.layers[
            1
        ].mlp.experts.down_proj[[5, 2]]
    model.save_pretrained(tmp_path / "hf")
    assert not checks.check_export(source, tmp_path / "hf", dtype=None).holds
