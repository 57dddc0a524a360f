"""Exports that a popular program would read otherwise are told, and not served by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mone_megatron.serving.engine import Engine
from mone_megatron.serving.misread import misreadings
from mone_megatron.serving.server import find_model, ready_folder


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "hidden_act": "silu"}, []),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, ["llama.cpp norm_topk_prob"]),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, ["llama.cpp norm_topk_prob"]),
        ({"model_type": "qwen2_moe", "norm_topk_prob": False}, []),
        # Always 1, and no key says so.
        ({"model_type": "mixtral"}, []),
        (
            {"model_type": "qwen3_moe", "norm_topk_prob": True, "hidden_act": "relu2"},
            ["llama.cpp hidden_act", "vLLM hidden_act"],
        ),
        ({"model_type": "llama", "hidden_act": "sigmoid"}, ["llama.cpp hidden_act"]),
        ({"model_type": "olmoe", "norm_topk_prob": False, "rms_norm_eps": 1e-5}, []),
        (
            {"model_type": "olmoe", "norm_topk_prob": True, "rms_norm_eps": 1e-6},
            ["llama.cpp norm_topk_prob", "vLLM norm_topk_prob", "vLLM rms_norm_eps"],
        ),
        # Read by our own code only.
        ({"model_type": "mone", "norm_topk_prob": False, "hidden_act": "relu2"}, []),
    ],
)
def test_what_is_read_otherwise(config: dict[str, Any], found: list[str]) -> None:
    assert [f"{wrong.program} {wrong.key}" for wrong in misreadings(config)] == found


@pytest.mark.parametrize(
    ("config", "plugin", "message"),
    [
        ({"model_type": "olmoe", "rms_norm_eps": 1e-6}, "0.1", "--architecture mone"),
        ({"model_type": "mixtral", "hidden_act": "relu2"}, "0.1", "passes over hidden_act=relu2"),
        ({"model_type": "mone"}, None, r"needs the plugin .* pip install \./serving/vllm"),
    ],
)
def test_what_vllm_would_answer_wrongly_is_not_served(
    config: dict[str, Any], plugin: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = Engine(Path(sys.executable), "vllm", "0.32.0", plugin)
    with pytest.raises(ValueError, match=message):
        ready_folder(find_model(tmp_path, say=print), engine, dry_run=True, say=print)
