"""Hugging Face models of the true classes to checkpoints of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import ALL, DENSE, random_model, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mone_megatron.checkpoint import open_checkpoint
from mone_megatron.checkpoint.tensors import TensorReader, different_tensors
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from mone_megatron.hf.checks import check_import
from mone_megatron.hf.importing import (
    Upcycling,
    model_overrides,
    plan_import,
    run_import,
)
from mone_megatron.hf.settings import from_hf_config
from mone_megatron.hf.weights import open_weights

_WEIGHTS = "model.safetensors"


def import_model(
    folder: Path,
    output: Path,
    upcycling: Upcycling | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    with open_weights(folder) as weights:
        planned = plan_import(folder, weights, upcycling=upcycling)
        return run_import(
            planned,
            weights,
            output,
            dtype=dtype,
            seed=1,
            name="imported",
            check=lambda checkpoint: None,
            progress=lambda message: None,
        )


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = save_model(name, tmp_path / "hf", tokenizer_dir)
    checkpoint = import_model(folder, tmp_path / "ours")
    found = check_import(checkpoint, folder, choices=True)
    assert found.tokens == 1024
    assert found.holds, found.describe()
    assert found.compared > 0.98 * found.tokens


@pytest.mark.parametrize("name", DENSE)
def test_upcycled_it_computes_the_same_at_first(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    folder = save_model(name, tmp_path / "hf", tokenizer_dir)
    checkpoint = import_model(folder, tmp_path / "ours", Upcycling(4, 2))
    found = check_import(checkpoint, folder, choices=False)
    assert found.holds, found.describe()
    reader = TensorReader(open_checkpoint(checkpoint))
    routers = [reader.read(f"decoder.layers.{layer}.mlp.router.weight") for layer in (0, 1)]
    assert routers[0].shape == (4, 32)
    assert not torch.equal(routers[0], routers[1])
    experts = reader.read("decoder.layers.1.mlp.experts.down_weight")
    assert torch.equal(experts[0], experts[3])


def test_experts_are_read_fused_or_apart(tmp_path: Path, tokenizer_dir: Path) -> None:
    """transformers saves experts apart; some programs save what transformers holds."""
    apart = save_model("mixtral", tmp_path / "apart", tokenizer_dir)
    fused = save_model("mixtral", tmp_path / "fused", tokenizer_dir)
    weights = random_model("mixtral").state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, fused / _WEIGHTS)
    readers = [
        TensorReader(open_checkpoint(import_model(folder, tmp_path / f"ours-{folder.name}")))
        for folder in (apart, fused)
    ]
    assert different_tensors(*readers, iter(readers[0].tensors)) == []


def test_padding_rows_are_zero_and_nothing_else(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = save_model("llama", tmp_path / "hf", tokenizer_dir, vocab_size=330)
    reader = TensorReader(open_checkpoint(import_model(folder, tmp_path / "ours")))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = reader.read(name)
        assert rows.shape == (384, 32)
        assert rows[:330].any(dim=-1).all()
        assert not rows[330:].any()


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / _WEIGHTS)
    change(weights)
    save_file(weights, folder / _WEIGHTS)


_DOWN = "model.layers.1.mlp.down_proj.weight"
# What is done to a good model, and what the refusal says.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor missing": (
        lambda f: change_weights(f, lambda w: w.pop(_DOWN)),
        f"{_DOWN} is missing",
    ),
    "tensor extra": (
        lambda f: change_weights(f, lambda w: w.update({"model.adapter": torch.ones(2)})),
        "model.adapter has no place in our model",
    ),
    "tensor reshaped": (
        lambda f: change_weights(f, lambda w: w.update({_DOWN: w[_DOWN].T.contiguous()})),
        rf"{_DOWN} is \(48, 32\), not \(32, 48\)",
    ),
    "tensor zero": (
        lambda f: change_weights(f, lambda w: w[_DOWN].zero_()),
        f"{_DOWN} is all zero",
    ),
    "tensor not finite": (
        lambda f: change_weights(f, lambda w: w[_DOWN].fill_(torch.inf)),
        f"{_DOWN} holds values that are not finite",
    ),
    "shard truncated": (
        lambda f: (f / _WEIGHTS).write_bytes((f / _WEIGHTS).read_bytes()[:-64]),
        "model.safetensors: is truncated or damaged",
    ),
    "vocabulary of another model": (
        lambda f: change_config(f, vocab_size=640),
        r"model.embed_tokens.weight is \(320, 32\), not \(640, 32\)",
    ),
    "tokenizer too large": (
        lambda f: save_tokenizer(train_tokenizer(_TEXTS, 600), f),
        "its tokenizer has .* entries, more than vocab_size=320",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "architecture not supported": (
        lambda f: change_config(f, model_type="gpt2"),
        "architecture 'gpt2' is not supported; supported are qwen3_moe",
    ),
    "remote code": (
        lambda f: change_config(
            f, model_type="their_own", auto_map={"AutoConfig": "code.TheirConfig"}
        ),
        "needs code of its own, which is not run here",
    ),
    "bias on the output projection": (
        lambda f: change_config(f, attention_bias=True),
        "attention_bias=true is not supported",
    ),
    "scaled rope": (
        lambda f: change_config(
            f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "rope_parameters.rope_type='linear' is not supported",
    ),
    "activation": (
        lambda f: change_config(f, hidden_act="gelu"),
        "hidden_act='gelu' is not supported",
    ),
    "head of another embedding": (
        lambda f: change_config(f, tie_word_embeddings=True),
        "tie_word_embeddings is true, but lm_head.weight is not",
    ),
    "pickled weights": (
        lambda f: (f / _WEIGHTS).rename(f / "pytorch_model.bin"),
        "holds pickled weights only",
    ),
    "no weights": (lambda f: (f / _WEIGHTS).unlink(), "holds no model.safetensors"),
}
_TEXTS = [
    "some words to learn from, again and again: abracadabra " * 30 + str(i) for i in range(99)
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("good") / "hf", tokenizer_dir)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_and_nothing_is_written(
    damage: str, good: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(good, tmp_path / "hf")
    act, message = DAMAGES[damage]
    act(folder)
    with pytest.raises(ValueError, match=message) as caught:
        import_model(folder, tmp_path / "ours")
    assert all(
        line.startswith(str(folder)) or "is all" in line or "finite" in line
        for line in str(caught.value).splitlines()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def sharded(folder: Path, model: str, tokenizer: Path) -> tuple[Path, dict[str, str]]:
    save_model(model, folder, tokenizer)
    random_model(model).save_pretrained(folder, max_shard_size="10KB")
    (folder / _WEIGHTS).unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text(encoding="utf-8"))["weight_map"]


INDEX_DAMAGES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "outside": (lambda m: m.update({_DOWN: "../secret.safetensors"}), "is not a file of it"),
    "absolute": (lambda m: m.update({_DOWN: "/etc/passwd.safetensors"}), "is not a file of it"),
    "not weights": (lambda m: m.update({_DOWN: "config.json"}), "is not a file of it"),
    "gone": (lambda m: m.update({_DOWN: "model-9.safetensors"}), "model-9.safetensors: is missing"),
    "elsewhere": (
        lambda m: m.update({_DOWN: m["lm_head.weight"]}),
        f"holds no {_DOWN}, which model.safetensors.index.json says it does",
    ),
    "unlisted": (lambda m: m.pop(_DOWN), f"holds {_DOWN}, which .*index.json does not say"),
    "empty": (lambda m: m.clear(), "names no tensors"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_an_index_is_not_trusted(damage: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    index, weight_map = sharded(tmp_path / "hf", "llama", tokenizer_dir)
    act, message = INDEX_DAMAGES[damage]
    act(weight_map)
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_shards_are_read_where_they_lie(tmp_path: Path, tokenizer_dir: Path) -> None:
    one = save_model("llama", tmp_path / "one", tokenizer_dir)
    sharded(tmp_path / "many", "llama", tokenizer_dir)
    readers = [
        TensorReader(open_checkpoint(import_model(folder, tmp_path / f"ours-{folder.name}")))
        for folder in (one, tmp_path / "many")
    ]
    assert different_tensors(*readers, iter(readers[0].tensors)) == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 64}, "sliding_window=64 is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: dense layers must be"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05: only 1e-06 is supported"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
            "num_experts_per_tok=2 and topk_group=1 ranks groups in a way",
        ),
    ],
)
def test_settings_that_we_cannot_compute_are_named(
    name: str, changes: dict[str, object], message: str
) -> None:
    model_type, settings = ALL[name]
    config = AutoConfig.for_model(model_type, **settings | changes)
    with pytest.raises(ValueError, match=message):
        from_hf_config(config, "model")


@pytest.mark.parametrize(
    ("upcycling", "message"),
    [
        (Upcycling(4, 5), "--upcycle-experts-per-token: 5 is not between 1 and"),
        (Upcycling(4, 1), "--upcycle-experts-per-token: 1 expert has the weight 1"),
        (Upcycling(4, 0), "--upcycle-experts-per-token: 0 is not between 1 and"),
    ],
)
def test_upcycling_that_cannot_be(good: Path, upcycling: Upcycling, message: str) -> None:
    with open_weights(good) as weights, pytest.raises(ValueError, match=message):
        plan_import(good, weights, upcycling=upcycling)


def test_a_moe_is_not_upcycled(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = save_model("mixtral", tmp_path / "hf", tokenizer_dir)
    with pytest.raises(ValueError, match="the model has experts already"):
        import_model(folder, tmp_path / "ours", Upcycling(4, 2))


@pytest.mark.parametrize("name", ALL)
def test_the_keys_that_are_printed_start_a_run(name: str) -> None:
    """Composed as a command line is, and accepted by the checks that a run begins with."""
    model = from_hf_config(random_model(name).config, "model").model
    composed = compose(["model=base", *model_overrides(model), "data=indexed", "data.paths=[x]"])
    assert composed.model == model
    validate(composed, world_size=1)


@pytest.mark.parametrize("name", DENSE)
def test_the_keys_of_an_upcycled_model_start_a_run(
    name: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    folder = save_model(name, tmp_path / "hf", tokenizer_dir)
    with open_weights(folder) as weights:
        model = plan_import(folder, weights, upcycling=Upcycling(4, 2)).model
    composed = compose(["model=base", *model_overrides(model), "data=indexed", "data.paths=[x]"])
    assert composed.model == model
    validate(composed, world_size=1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with weights that sum to 1"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with weights that sum"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "model.first_dense_layers: 3 leaves no MoE"),
        ("llama", {"head_dim": 9}, "config.json: cannot be used .*head_dim`=9"),
        (
            "qwen3_moe",
            {"hidden_size": 34, "num_attention_heads": 2},
            "model.hidden_size: 34 is not a multiple of 4",
        ),
        ("mixtral", {"num_local_experts": 1}, "model.experts_per_token: 2 is more than"),
    ],
)
def test_what_no_run_could_have_is_not_imported(
    name: str, changes: dict[str, object], message: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    save_model(name, tmp_path / "hf", tokenizer_dir)
    # The weights do not matter: it is refused before they are looked at.
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert "--" not in str(caught.value)
    assert not (tmp_path / "ours").exists()
