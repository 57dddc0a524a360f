"""Exports in vLLM against transformers, on the CPU build: `make test-vllm`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_answers import Answer, answers_of, differences, first_difference
from served_models import PRUNING, RUNS
from vllm_environment import PYTHON, generate, run

from mone_megatron.hf.experts_mone import ExpertRows, NeuronSettings
from mone_megatron.methods.activations import ACTIVATIONS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM: run make test-vllm"),
]
NEW = 32
# Logprobs of two programs in fp32, and of a model that keeps other neurons.
CLOSE, FAR = 1e-4, 0.05
SELECTING = [name for name, changes in RUNS.items() if "experiment=tiny_mone" in changes]
IN_PROCESS = {"distributed_executor_backend": "uni"}
EAGER = IN_PROCESS | {"enforce_eager": True}
# Name -> (model, options of vLLM).
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, EAGER) for name in RUNS},
    "plain_shared, compiled": ("plain_shared", IN_PROCESS),
    **{
        f"{name}, two ranks": (name, {"tensor_parallel_size": 2, "enforce_eager": True})
        for name in ("gated_shared", "plain_shared", "sigmoid")
    },
    "learned_in_experts, experts on two ranks": (
        "learned_in_experts",
        {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enforce_eager": True},
    ),
}
# Name -> (model, changes of its config.json, options of vLLM, what the error says).
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "quantised": (
        "plain",
        {},
        {"quantization": "fp8", "dtype": "bfloat16"},
        "quantised experts compute all neurons",
    ),
    "LoRA": ("plain", {}, {"enable_lora": True}, "LoRA"),
    "latent attention": ("plain", {"attention_type": "mla"}, {}, "attention_type=mla"),
    "a router of ours": ("plain", {"router_kind": "relu"}, {}, "router_kind=relu"),
    "a cheap gate": ("plain", {"gate": "split"}, {}, "gate=split"),
    "product keys": ("plain", {"product_key": {"keys": 4}}, {}, "product_key: single-neuron"),
    "unknown score": (
        "plain",
        {"mone": {"keep_ratio": 0.25, "score": "mine"}},
        {},
        "mone.score: 'mine' is unknown",
    ),
    "unknown activation": ("plain", {"hidden_act": "mine"}, {}, "hidden_act=mine"),
    "a bias without a place": ("gated_shared", {"qkv_bias": False}, {}, "asks for no such bias"),
    "a weight that is missing": ("sigmoid", {"qkv_bias": True}, {}, "has no weight"),
}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    return {name: folder / f"{name}.pt" for name in SELECTING}


@pytest.fixture(scope="session")
def given(
    exports: dict[str, Path],
    prompts: list[list[int]],
    recorded: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What vLLM gives for every job, and for every one that it is to refuse."""
    folder = tmp_path_factory.mktemp("given")
    asked: list[dict[str, Any]] = [
        {
            "name": name,
            "model": str(exports[model]),
            "prompts": prompts,
            "new": NEW,
            "options": options,
            "record": str(recorded[name]) if name in recorded else None,
        }
        for name, (model, options) in JOBS.items()
    ]
    for name, (model, changes, options, _) in REFUSED.items():
        changed = folder / name.replace(" ", "_")
        shutil.copytree(exports[model], changed)
        change_config(changed, **changes)
        asked.append(
            {
                "name": name,
                "model": str(changed),
                "prompts": prompts[:1],
                "new": 1,
                "options": EAGER | options,
            }
        )
    return generate(asked, folder)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", JOBS)
def test_logprobs_and_greedy_tokens_are_those_of_transformers(
    name: str,
    expected: dict[str, list[Answer]],
    given: dict[str, dict[str, Any]],
    measured: list[str],
) -> None:
    answers, result = expected[JOBS[name][0]], given[name]
    assert "error" not in result, result["error"]
    farthest = max(differences(answers, result["texts"]))
    measured.append(f"{name}: logprobs at most {farthest:.1e} from transformers")
    assert farthest < CLOSE
    for answer, text in zip(answers, result["texts"], strict=True):
        place = first_difference(answer, text)
        # Two tokens as likely as each other, to rounding: either may be chosen.
        assert place == len(answer.tokens) or answer.margins[place] < CLOSE


@pytest.mark.parametrize("name", PRUNING)
def test_it_is_far_from_what_keeping_all_neurons_gives(
    name: str,
    exports: dict[str, Path],
    prompts: list[list[int]],
    given: dict[str, dict[str, Any]],
    measured: list[str],
) -> None:
    dense = answers_of(exports[name], prompts, 1, experts="grouped_mm")
    texts = [text | {"tokens": text["tokens"][:1]} for text in given[name]["texts"]]
    farthest = max(differences(dense, texts))
    measured.append(f"{name}: up to {farthest:.2f} from keeping all neurons")
    assert farthest > FAR


@pytest.mark.parametrize("name", SELECTING)
def test_kept_neurons_are_bitwise_those_of_the_definition(
    name: str,
    exports: dict[str, Path],
    recorded: dict[str, Path],
    given: dict[str, dict[str, Any]],
) -> None:
    assert given
    config = json.loads((exports[name] / "config.json").read_text())
    settings = NeuronSettings.from_config(config["mone"])
    activate = ACTIVATIONS[config["hidden_act"]].function
    calls = torch.load(recorded[name])
    rows = 0
    for call in calls:
        rows_read = call["rows"]
        norms = rows_read.get("down_norm_TF")
        expert_T = rows_read.get("expert_T")
        rows_of = None
        if expert_T is not None:
            # A rule with a state reads the expert of a row; none that is served reads the rest.
            rows_of = ExpertRows(expert_T, torch.arange(len(expert_T)), torch.ones(len(expert_T)))
        mask = settings.mask(
            call["gate"],
            call["up"],
            activate,
            down_norm=lambda norms=norms: norms,
            state=rows_read.get("state"),
            rows=rows_of,
        )
        assert torch.equal(call["mask"], mask)
        rows += len(mask)
    assert rows > 1000


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    name: str, given: dict[str, dict[str, Any]]
) -> None:
    assert REFUSED[name][3] in given[name].get("error", "it answered")


def test_without_the_plugin_vllm_never_answers_for_a_dense_model(
    exports: dict[str, Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    invited = tmp_path / "invited"
    shutil.copytree(exports["plain"], invited)
    auto_map = json.loads((invited / "config.json").read_text())["auto_map"]
    # What users add when they read vLLM's error.
    change_config(invited, auto_map=auto_map | {"AutoModel": "modeling_mone.MoneModel"})
    asked = [
        {
            "name": name,
            "model": str(folder),
            "prompts": prompts[:1],
            "new": 1,
            "options": EAGER | {"trust_remote_code": True},
        }
        for name, folder in {"as exported": exports["plain"], "invited": invited}.items()
    ]
    # Of all plugins that are installed, none.
    given = generate(asked, tmp_path, VLLM_PLUGINS="")
    assert "error" in given["as exported"]
    assert "does not select neurons" in given["invited"].get("error", "it answered")


def test_another_vllm_is_refused_with_the_line_to_change_and_serves_other_models(
    exports: dict[str, Path],
) -> None:
    said = run("refuse_another_vllm.py", str(exports["plain"]), str(exports["stock"]))
    ours, stock = said.strip().splitlines()[-2:]
    assert "with vLLM from 0.1 to before 0.2, and this is" in ours
    assert "install vllm==0.1.0" in ours
    assert ours.endswith("versions.py after `make test-vllm` has passed with it")
    assert stock == "Qwen3MoeConfig"


def test_what_cuda_launches_compiles_with_the_engines_triton() -> None:
    assert "topk_mask_kernel" in run("compile_for_cuda.py", TRITON_INTERPRET="0")
