"""The state of a selection rule outside its own run: exports, imports, another run's beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mone_megatron.hf import checks, export
from mone_megatron.hf.importing import plan_import, run_import
from mone_megatron.hf.loading import build_from_checkpoint
from mone_megatron.hf.source import Source, open_source
from mone_megatron.hf.weights import open_weights
from mone_megatron.testing.launch import run_layouts

RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=2",
    "train.global_batch_size=4",
    "checkpoint.interval=1", "logging.wandb.mode=disabled", "logging.report=false",
    "logging.progress=none",
)  # fmt: skip
EVERYWHERE = (
    "model.first_dense_layers=1", "model.shared_expert_ffn_hidden_size=64",
    "mone.apply_to=[routed,shared,dense]",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    run_layouts({"batch": (*RUN, *EVERYWHERE, "mone.rule=batch_topk")}, processes=1, folder=folder)
    return folder


def written(source: Source, output: Path, dtype: torch.dtype | None) -> Path:
    export.export(
        source,
        output,
        architecture=export.choose_architecture(source, "auto"),
        dtype=dtype,
        shard_bytes=10**9,
        check=lambda folder: "",
        progress=lambda message: None,
    )
    return output


def tau(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("rule_tau")}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_selects_by_the_thresholds_of_the_training(
    runs: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    source = open_source(runs / "batch", say=lambda message: None)
    folder = written(source, tmp_path / "hf", dtype)
    found = checks.check_export(source, folder, dtype=dtype)
    assert found.holds, found.describe()
    held = tau(load_file(folder / "model.safetensors"))
    # A dense layer, and the routed and the shared experts of three others.
    assert len(held) == 1 + 2 * 3
    assert all(value.dtype is torch.float32 and (value > 0).all() for value in held.values())
    assert (folder / "neuron_rule.py").read_text().count("batch_topk")
    # The same model in memory.
    built = tau(dict(build_from_checkpoint(source).named_buffers()))
    assert built.keys() == held.keys()
    assert all(torch.equal(built[name], held[name]) for name in held)


def test_an_import_keeps_them(runs: Path, tmp_path: Path) -> None:
    source = open_source(runs / "batch", say=lambda message: None)
    folder = written(source, tmp_path / "hf", None)
    with open_weights(folder) as weights:
        again = run_import(
            plan_import(folder, weights), weights, tmp_path / "run", dtype=None, seed=0,
            name="again", check=lambda checkpoint: None, progress=lambda message: None,
        )  # fmt: skip
    other = open_source(again, say=lambda message: None)
    names = [name for name in source.weights if "selector.rule_" in name]
    assert len(names) == 2 * 7
    for name in names:
        assert torch.equal(other.read(name, dtype=None), source.read(name, dtype=None))


def test_a_run_that_begins_with_a_model_of_another_rule_has_a_new_state(
    runs: Path, tmp_path: Path
) -> None:
    first = runs / "batch" / "checkpoints" / "step_00000002"
    begun = (*RUN, *EVERYWHERE, f"checkpoint.initialize={first}")
    jobs = {"other": (*begun, "mone.rule=threshold"), "same": (*begun, "mone.rule=batch_topk")}
    run_layouts(jobs, processes=1, folder=tmp_path)
    for name in jobs:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
