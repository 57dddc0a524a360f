"""The shifted form of statistical top-k: against transformers' own function, and in training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_each_rule import problems
from torch import Tensor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from mone_megatron.hf import export
from mone_megatron.hf.experts_mone import NeuronSettings
from mone_megatron.hf.source import open_source
from mone_megatron.kernels import reference
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector
from mone_megatron.testing.launch import run_layouts

ROWS, NEURONS = 24, 64
OPTIONS = {"shifted": True}


def selector(keep_ratio: float) -> NeuronSelector:
    return NeuronSelector(
        NeuronSelection(keep_ratio, "signed_gate", "statistical", OPTIONS), NEURONS
    )


@pytest.mark.parametrize("keep_ratio", [0.05, 0.25, 0.75])
def test_it_is_what_gemma_3n_computes(keep_ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, ROWS, NEURONS, generator=generator, dtype=torch.float64)
    leaves = [(2 * gate + 0.3).requires_grad_(), up.requires_grad_()]
    module = selector(keep_ratio)

    def ours(gate: Tensor, up: Tensor) -> Tensor:
        left = module.shifted(gate)
        return reference.selected_glu(left, up, module(left, up), None)

    def theirs(gate: Tensor, up: Tensor) -> Tensor:
        left = Gemma3nTextMLP._gaussian_topk(
            SimpleNamespace(activation_sparsity=1 - keep_ratio),
            gate,  # type: ignore[arg-type]
        )
        return torch.nn.functional.silu(left) * up

    torch.testing.assert_close(ours(*leaves), theirs(*leaves), rtol=1e-5, atol=1e-6)
    for mine, expected in zip(
        torch.autograd.grad(ours(*leaves).square().sum(), leaves),
        torch.autograd.grad(theirs(*leaves).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_row_that_holds_a_nan_keeps_nothing_and_an_even_row_has_a_slope() -> None:
    gate = torch.randn(3, NEURONS)
    gate[1, 5] = torch.nan
    gate[2] = 1.0
    gate.requires_grad_()
    module = selector(0.25)
    left = module.shifted(gate)
    assert not module(left, left)[1:].any()
    (slope,) = torch.autograd.grad(left[2].sum(), gate)
    assert slope[2].isfinite().all()


RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=3",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "logging.layer_interval=1", "checkpoint.interval=1", "mone.rule=statistical",
    "mone.score=signed_gate",
)  # fmt: skip
SHIFTED = (*RUN, "mone.rule_options.shifted=true")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_the_same_in_every_layout_and_is_not_exported(tmp_path: Path) -> None:
    run_layouts({"one": SHIFTED, "plain": RUN}, processes=1, folder=tmp_path)
    saved = tmp_path / "one" / "checkpoints" / "step_00000002"
    run_layouts({"resumed": (*SHIFTED, f"checkpoint.resume={saved}")}, processes=1, folder=tmp_path)
    two = {
        "ep2": (*SHIFTED, "parallel.expert=2"),
        "etp2": (*SHIFTED, "parallel.tensor=2", "parallel.expert_tensor=2"),
    }
    run_layouts(two, processes=2, folder=tmp_path)
    one = records(tmp_path / "one")
    (resumed,) = records(tmp_path / "resumed")
    assert (resumed["loss"], resumed["grad_norm"]) == (one[2]["loss"], one[2]["grad_norm"])
    for layout in two:
        for expected, found in zip(one, records(tmp_path / layout), strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    plain = records(tmp_path / "plain")
    # The first step keeps the same neurons, and gives them other values.
    assert one[0]["mone/density"] == pytest.approx(plain[0]["mone/density"], rel=1e-2)
    assert one[0]["loss"] != plain[0]["loss"]
    source = open_source(tmp_path / "one", say=lambda message: None)
    with pytest.raises(ValueError, match=r"mone\.rule_options\.shifted: true changes gate"):
        export.choose_architecture(source, "auto")


def test_it_is_refused_where_it_would_mean_something_else() -> None:
    (found,) = problems("mone.rule=statistical", "mone.rule_options.shifted=true")
    assert found.startswith("mone.score: abs_activation with mone.rule_options.shifted=true")
    with pytest.raises(ValueError, match=r"mone\.rule_options\.shifted: true changes gate"):
        NeuronSettings(0.25, "signed_gate", rule="statistical", rule_options=OPTIONS)
