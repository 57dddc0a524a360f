"""Exports of models whose up projections are rectified, too: dReLU in our class of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mone_megatron.hf import checks, export
from mone_megatron.hf.decode_mone import unsupported
from mone_megatron.hf.experts_mone import experts_modules
from mone_megatron.hf.importing import plan_import, run_import
from mone_megatron.hf.source import open_source
from mone_megatron.hf.weights import open_weights
from mone_megatron.testing.launch import run_layouts

RUN = (
    "device=cpu", "data.max_megabytes=0.2", "train.steps=2", "checkpoint.interval=2",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "model.activation=drelu",
)  # fmt: skip
RUNS = {
    "moe": ("experiment=tiny_moe", *RUN),
    "topk": ("experiment=tiny_mone", *RUN),
    "nonzero": ("experiment=tiny_mone", *RUN, "mone.rule=nonzero", "mone.score=abs_product"),
    "low-rank": ("experiment=tiny_mone", *RUN, "model.gate=low_rank"),
    "everywhere": (
        "experiment=tiny_mone", *RUN, "model.first_dense_layers=1",
        "model.shared_expert_ffn_hidden_size=64", "mone.apply_to=[routed,shared,dense]",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drelu")
    run_layouts(RUNS, processes=1, folder=folder)
    for name in RUNS:
        source = open_source(folder / name, say=lambda message: None)
        architecture = export.choose_architecture(source, "auto")
        assert architecture.model_type == "mone"
        export.export(
            source, folder / f"{name}-hf", architecture=architecture, dtype=None,
            shard_bytes=10**9, check=lambda folder: "", progress=lambda message: None,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_logits_and_kept_neurons_are_those_of_training(exports: Path, name: str) -> None:
    source = open_source(exports / name, say=lambda message: None)
    found = checks.check_export(source, exports / f"{name}-hf", dtype=None)
    assert found.holds, found.describe()
    config = AutoConfig.from_pretrained(exports / f"{name}-hf", trust_remote_code=True)
    assert (config.hidden_act, config.rectified_up) == ("relu", True)


def test_the_rectified_up_projection_matters_and_sparse_decoding_says_so(exports: Path) -> None:
    def model(**changes: object) -> torch.nn.Module:
        loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            exports / "topk-hf", trust_remote_code=True, **changes
        )
        return loaded.eval()

    def logits(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.arange(12).unsqueeze(0)).logits
        return found

    rectified = model()
    assert not torch.allclose(logits(rectified), logits(model(rectified_up=False)))
    for experts in experts_modules(rectified):  # type: ignore[arg-type]
        assert unsupported(experts) == "rectifies its up projection"  # type: ignore[arg-type]


def test_a_stock_class_cannot_hold_it(exports: Path) -> None:
    source = open_source(exports / "moe", say=lambda message: None)
    with pytest.raises(ValueError, match="rectified_up=True"):
        export.choose_architecture(source, "qwen3_moe")


def test_an_import_takes_it_up_again(exports: Path, tmp_path: Path) -> None:
    folder = exports / "topk-hf"
    with open_weights(folder) as weights:
        again = run_import(
            plan_import(folder, weights), weights, tmp_path / "run", dtype=None, seed=0,
            name="again", check=lambda checkpoint: None, progress=lambda message: None,
        )  # fmt: skip
    assert open_source(again, say=lambda message: None).model.activation == "drelu"
