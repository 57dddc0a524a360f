"""SGLang's Transformers backend, by a stand-in for it, never answers for a model that selects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCABULARY
from mone_models import build

from mone_megatron.config.schema import ModelConfig, MoNEConfig
from mone_megatron.hf.export import AUTO_MAP, write_code

TOKENS = torch.randint(1, VOCABULARY, (24,), generator=torch.Generator().manual_seed(5)).tolist()
# What users add when they read the error that an export as it is ends with.
INVITED = AUTO_MAP | {"AutoModel": "modeling_mone.MoneModel"}


def exported(folder: Path, auto_map: dict[str, str], **changes: Any) -> torch.Tensor:
    """Writes a random model as an export is written, and returns what it answers in fact."""
    model = build("plain", **changes)
    model.save_pretrained(folder)
    write_code(folder, MoNEConfig(enabled=True, keep_ratio=0.25), ModelConfig())
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
    path.write_text(json.dumps(config), encoding="utf-8")
    with torch.no_grad():
        return model.model(torch.tensor([TOKENS])).last_hidden_state[0]


SHARED = {
    "shared_expert_intermediate_size": 24,
    "mone": {"keep_ratio": 0.25, "apply_to": ["routed", "shared"]},
}
PRODUCT_KEYS = {
    "mone": None,
    "num_experts": 0,
    "product_key": {"keys": 8, "heads": 2, "key_dim": 4, "experts_per_head": 3},
}
# Name -> (auto_map, changes of the model).
EXPORTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "all neurons": (INVITED, {"mone": None}),
    "as it is": (AUTO_MAP, {}),
    "product keys": (AUTO_MAP, PRODUCT_KEYS),
    "product keys, invited": (INVITED, PRODUCT_KEYS),
    "invited": (INVITED, {}),
    "invited, dense layers": (INVITED, {"mlp_only_layers": [0]}),
    "invited, shared experts": (INVITED, SHARED),
    "unguarded": (INVITED, {}),
}


Found = dict[str, tuple[torch.Tensor, dict[str, Any]]]


@pytest.fixture(scope="module")
def expected_and_served(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each export answers, and what the stand-in gives for it."""
    root = tmp_path_factory.mktemp("sglang")
    folders = [root / name.replace(" ", "_").replace(",", "") for name in EXPORTS]
    expected = [
        exported(folder, auto_map, **changes)
        for folder, (auto_map, changes) in zip(folders, EXPORTS.values(), strict=True)
    ]
    # As if nothing were ever replaced.
    guard = folders[-1] / "guard_mone.py"
    text = guard.read_text(encoding="utf-8")
    without = text.replace("if isinstance(module, nn.Identity) or", "if True or")
    assert without != text
    guard.write_text(without, encoding="utf-8")
    script = Path(__file__).with_name("sglang_stand_in.py")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    modules = {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(TOKENS), *map(str, folders)],
        env=variables | modules,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[-len(folders) :]
    return dict(zip(EXPORTS, zip(expected, map(json.loads, lines), strict=True), strict=True))


def test_the_stand_in_answers_rightly_for_a_model_that_keeps_all_neurons(
    expected_and_served: Found,
) -> None:
    expected, served = expected_and_served["all neurons"]
    torch.testing.assert_close(torch.tensor(served["hidden"]), expected)


@pytest.mark.parametrize("name", ["as it is", "product keys"])
def test_an_export_as_it_is_cannot_be_built(name: str, expected_and_served: Found) -> None:
    _, served = expected_and_served[name]
    assert "Unrecognized configuration class" in served["error"]


def test_nothing_takes_the_place_of_experts_that_product_keys_find(
    expected_and_served: Found,
) -> None:
    """They are two tables, and no experts in the way that engines look for: ours compute."""
    expected, served = expected_and_served["product keys, invited"]
    torch.testing.assert_close(torch.tensor(served["hidden"]), expected)


@pytest.mark.parametrize("name", ["invited", "invited, dense layers", "invited, shared experts"])
def test_an_export_that_invites_refuses_the_experts_in_its_experts_place(
    name: str, expected_and_served: Found
) -> None:
    error = expected_and_served[name][1].get("error", "it answered")
    assert "TransformersFusedMoE, which does not select neurons (config.mone)" in error


def test_without_the_guard_the_answer_would_be_another_models(expected_and_served: Found) -> None:
    expected, served = expected_and_served["unguarded"]
    assert (torch.tensor(served["hidden"]) - expected).abs().max() > 0.05
