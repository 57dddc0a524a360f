"""What training does not change comes back: tokenizer, special tokens, settings of both kinds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hf_models import ALL, save_model
from test_export import export_run, open_run
from test_import import import_model
from transformers import AutoConfig, AutoTokenizer

from mone_megatron.config.schema import MoNEConfig
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.tokenizer import copy_tokenizer, tokenizer_files
from mone_megatron.hf.architectures import BY_TYPE, choose
from mone_megatron.hf.importing import model_overrides
from mone_megatron.hf.origin import Origin
from mone_megatron.hf.settings import from_hf_config, to_hf_config
from mone_megatron.testing.launch import run_layouts

_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
_IDS = {"bos_token_id": 5, "eos_token_id": [0, 7], "pad_token_id": 9, "unk_token_id": 3}
_GENERATION = {
    **{key: value for key, value in _IDS.items() if key != "unk_token_id"},
    # Of a model of the Hub; the library reads it and refuses to save it.
    "do_sample": False,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.31.0",
}
# What each class reads and we do not, beside what all have.
_SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"output_router_logits": True, "sliding_window": 4096, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": False, "sliding_window": 77, "max_window_layers": 1},
    "qwen2": {"use_sliding_window": False, "sliding_window": 77, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 3},
    "mixtral": {"router_jitter_noise": 0.01},
    "llama": {"pretraining_tp": 2},
    "deepseek_v2_lite": {"seq_aux": True},
}


def dress(folder: Path, name: str = "") -> Path:
    """Gives a model the files and keys that models of the Hub have."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | _IDS | _SPECIAL.get(name, {})
    settings |= {"attention_dropout": 0.1, "max_position_embeddings": 8192, "mine": {"a": [1]}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(_GENERATION), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) | {
        "chat_template": _TEMPLATE,
        "model_max_length": 8192,
        "bos_token": "!",
        "unk_token": {"__type": "AddedToken", "content": "#", "lstrip": True},
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "!"}', encoding="utf-8")
    (folder / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("of tools")
    return folder


def assert_same_tokenizer(folder: Path, other: Path) -> None:
    files = tokenizer_files(folder)
    assert Path("additional_chat_templates/tools.jinja") in files
    assert tokenizer_files(other) == files
    for name in files:
        assert (other / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("name", ALL)
def test_a_model_comes_back_as_it_was(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = dress(save_model(name, tmp_path / "hf", tokenizer_dir), name)
    if name == "qwen3_moe":
        # Files of one template only, as transformers 5 writes them.
        (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    export_run(open_run(import_model(folder, tmp_path / "ours")), tmp_path / "back")
    was, now = (
        json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "back")
    )
    assert was.pop("torch_dtype", was.pop("dtype", None)) == now.pop("dtype")
    assert {key: now.get(key) for key in was if key != "transformers_version"} == {
        key: value for key, value in was.items() if key != "transformers_version"
    }
    read_was, read_now = (
        AutoConfig.from_pretrained(one).to_dict() for one in (folder, tmp_path / "back")
    )
    for config in (read_was, read_now):
        del config["_name_or_path"], config["transformers_version"]
    assert read_now == read_was
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == _GENERATION
    assert_same_tokenizer(folder, tmp_path / "back")


def test_after_training_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    """On shorter sequences, through a resume, as MoE and MoNE; and a run that began anew."""
    folder = dress(save_model("qwen3_moe", tmp_path / "hf", tokenizer_dir), "qwen3_moe")
    # As transformers 5 writes it: beside other templates it does not look into the settings.
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    checkpoint = import_model(folder, tmp_path / "ours")
    source = open_run(checkpoint)
    keys = model_overrides(source.model)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "some words " * n}) + "\n" for n in range(9, 99)))
    preprocess_files([text], tmp_path / "data", TokenizerSettings(folder=folder))
    common = [
        "experiment=tiny_moe", "device=cpu", "train.seq_length=64", "train.steps=2",
        "train.global_batch_size=2", "train.micro_batch_size=2", "checkpoint.interval=1",
        "logging.report=false", "logging.wandb.mode=disabled",
        "data=indexed", f"data.paths=[{tmp_path / 'data'}]",
    ]  # fmt: skip
    begin = [*common, *keys, f"checkpoint.initialize={checkpoint}"]
    jobs = {
        "moe": begin,
        "mone": [*begin, "mone=quarter", "model.attention_dropout=0"],
        "own": common,
    }
    run_layouts(jobs, processes=1, folder=tmp_path)
    first = tmp_path / "moe" / "checkpoints" / "step_00000001"
    again = [*common, *keys, f"checkpoint.resume={first}", "checkpoint.keep_last=1"]
    run_layouts({"moe": again}, processes=1, folder=tmp_path)
    exported = {}
    for name in jobs:
        export_run(open_run(tmp_path / name), tmp_path / f"{name}-hf")
        exported[name] = json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())
        assert_same_tokenizer(folder, tmp_path / f"{name}-hf")
    assert not first.exists()
    for name in ("moe", "mone"):
        assert {key: exported[name].get(key) for key in _IDS if key != "unk_token_id"} == {
            key: value for key, value in _IDS.items() if key != "unk_token_id"
        }
        assert exported[name]["max_position_embeddings"] == 8192
        assert exported[name]["output_router_logits"] is True
        generation = json.loads((tmp_path / f"{name}-hf" / "generation_config.json").read_text())
        assert generation == _GENERATION
    assert exported["moe"]["max_window_layers"] == 2
    assert exported["moe"]["unk_token_id"] == 3
    assert exported["moe"]["mine"] == {"a": [1]}
    assert exported["moe"]["attention_dropout"] == 0.1
    # Training changed it.
    assert exported["mone"]["attention_dropout"] == 0.0
    assert exported["mone"]["architectures"] == ["MoneForCausalLM"]
    assert exported["own"]["max_position_embeddings"] == 64
    assert exported["own"]["eos_token_id"] == exported["own"]["pad_token_id"] == 0
    chat = AutoTokenizer.from_pretrained(tmp_path / "own-hf").apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert chat == "<user>hi"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Origin:
    folder = tmp_path_factory.mktemp("origin") / "hf"
    return Origin.read(dress(save_model("qwen3_moe", folder, tokenizer_dir)))


@pytest.mark.parametrize(
    ("changes", "trained_on", "expected"),
    [
        ({}, 128, 8192),
        ({}, 16384, 16384),
        # Other frequencies: nothing is known of longer sequences than it was trained on.
        ({"rope_theta": 5e5}, 128, 128),
        ({"rope_theta": 5e5}, 16384, 16384),
    ],
)
def test_positions_are_the_longest_that_hold(
    origin: Origin, changes: dict[str, Any], trained_on: int, expected: int
) -> None:
    imported = from_hf_config(origin.standard_config(), "model")
    model = replace(imported.model, **changes)
    for architecture in (choose(model, mone=False), BY_TYPE["mone"]):
        config = to_hf_config(
            model,
            MoNEConfig(),
            architecture=architecture,
            vocab_size=imported.vocab_size,
            max_positions=trained_on,
            dtype="float32",
            token_ids={"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0},
            origin=origin,
        )
        assert config.max_position_embeddings == expected
        assert config.rope_parameters["rope_theta"] == model.rope_theta
        assert config.initializer_range == model.init_std


def test_another_tokenizer_has_other_special_tokens(
    origin: Origin, tmp_path: Path, tokenizer_dir: Path
) -> None:
    assert origin.has_tokenizer(tokenizer_dir)
    other = shutil.copytree(tokenizer_dir, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(text))  # other bytes
    assert not origin.has_tokenizer(other)
    assert not origin.has_tokenizer(tmp_path)


def test_a_tokenizer_is_copied_whole_and_nothing_else(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = shutil.copytree(tokenizer_dir, tmp_path / "one")
    for name in ("tokenizer.model", "merges.txt", "README.md", "model.safetensors", "code.py"):
        (folder / name).write_text(name)
    copy_tokenizer(folder, tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt"
    }  # fmt: skip
