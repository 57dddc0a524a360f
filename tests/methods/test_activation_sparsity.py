"""Sparsity that activations make by themselves, and gradients of neurons that are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_each_rule import problems
from torch import Tensor

from mone_megatron.config.load import from_yaml
from mone_megatron.kernels import reference
from mone_megatron.methods.activations import ACTIVATIONS, up_function
from mone_megatron.mone.selection import NeuronSelection, NeuronSelector
from mone_megatron.mone.straight_through import masked_straight_through
from mone_megatron.planning.budget import Usage, budget_of
from mone_megatron.planning.parameters import gated_mlps
from mone_megatron.report.runs import load_run
from mone_megatron.report.usage import usage_of
from mone_megatron.testing.launch import run_layouts

RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=2",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "mone.balance.coeff=0", "logging.layer_interval=1",
)  # fmt: skip
PRODUCT = ("mone.rule=nonzero", "mone.score=abs_product")


def gate_and_up() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 30, 48, generator=generator)
    return gate, up


@pytest.mark.parametrize("name", ["relu", "relu2", "drelu"])
def test_nonzero_keeps_the_nonzeros_of_the_hidden_values(name: str) -> None:
    gate, up = gate_and_up()
    activate = ACTIVATIONS[name].function
    rectify = up_function(activate)
    assert (rectify is None) == (name != "drelu")
    up = up if rectify is None else rectify(up)
    hidden = activate(gate) * up
    module = NeuronSelector(NeuronSelection(0.25, "abs_product", "nonzero"), 48, activate=activate)
    mask = module(gate, up)
    assert torch.equal(mask, hidden != 0)
    assert mask.float().mean().item() == pytest.approx(0.25 if name == "drelu" else 0.5, abs=0.05)


def test_drelu_is_what_its_paper_says() -> None:
    gate, up = gate_and_up()
    drelu = ACTIVATIONS["drelu"]
    rectify = up_function(drelu.function)
    assert rectify is not None
    expected = torch.maximum(gate, torch.zeros(())) * torch.maximum(up, torch.zeros(()))
    assert torch.equal(
        reference.selected_glu(gate, rectify(up), None, None, drelu.function), expected
    )


def test_straight_through_is_masked_forward_and_dense_backward() -> None:
    gate, up = gate_and_up()
    mask = reference.topk_mask(gate.abs(), 12)
    scale = torch.rand(30)
    upstream = torch.randn(30, 48)
    inputs = [tensor.requires_grad_() for tensor in (gate, up, scale)]
    dense = reference.selected_glu(gate, up, None, scale)
    found = masked_straight_through(dense, mask)
    assert torch.equal(found, reference.selected_glu(gate, up, mask, scale))
    expected = torch.autograd.grad(dense, inputs, upstream, retain_graph=True)
    grads = torch.autograd.grad(found, inputs, upstream)
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))
    assert grads[0][~mask].any()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsity")
    one = {
        "relu-moe": (*RUN, "model.activation=relu", "mone.enabled=false"),
        "relu": (*RUN, "model.activation=relu", *PRODUCT),
        "drelu-moe": (*RUN, "model.activation=drelu", "mone.enabled=false"),
        "drelu": (*RUN, "model.activation=drelu", *PRODUCT, "checkpoint.interval=1"),
        "shared": (
            *RUN,
            "mone.rule=mass",
            "mone.apply_to=[shared,dense]",
            "model.first_dense_layers=1",
            "model.shared_expert_ffn_hidden_size=64",
        ),
        "masked": RUN,
        "through": (*RUN, "mone.straight_through=true"),
        "through-balanced": (*RUN, "mone.straight_through=true", "mone.balance.coeff=0.01"),
    }
    after_one = folder / "drelu" / "checkpoints" / "step_00000001"
    one["drelu-resumed"] = (*one["drelu"], f"checkpoint.resume={after_one}")
    run_layouts(one, processes=1, folder=folder)
    two = {
        f"{job}-{name}": (*one[job], *layout)
        for job in ("through", "drelu")
        for name, layout in (
            ("ep2", ["parallel.expert=2"]),
            ("etp2", ["parallel.tensor=2", "parallel.expert_tensor=2"]),
        )
    }
    run_layouts(two, processes=2, folder=folder)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "density"), [("relu", 0.5), ("drelu", 0.25)])
def test_the_true_density_is_logged_and_nothing_else_changes(
    runs: Path, name: str, density: float
) -> None:
    for with_mask, without in zip(records(runs / name), records(runs / f"{name}-moe"), strict=True):
        assert with_mask["loss"] == without["loss"]
        assert with_mask["mone/density"] == pytest.approx(density, abs=0.08)


def test_the_share_of_positive_gates_is_logged_where_up_projections_are_rectified(
    runs: Path,
) -> None:
    """It is the same in every layout and after a resume, and what a measured budget reads."""
    found = records(runs / "drelu")
    for record in found:
        assert record["mone/density"] < record["mone/active_share"]
        assert record["mone/active_share"] == pytest.approx(0.5, abs=0.08)
    for layout in ("ep2", "etp2"):
        for one, other in zip(found, records(runs / f"drelu-{layout}"), strict=True):
            # A gate near 0 may have another sign where its sum is of other parts.
            expected = pytest.approx(one["mone/active_share"], abs=1e-4)
            assert other["mone/active_share"] == expected
    resumed = records(runs / "drelu-resumed")
    assert [record["mone/active_share"] for record in resumed] == [found[1]["mone/active_share"]]
    for name in ("relu", "masked"):
        assert all("mone/active_share" not in record for record in records(runs / name))
    run = load_run(runs / "drelu")
    config = from_yaml(runs / "drelu" / "config.yaml")
    usage = usage_of(config, run)
    assert usage == Usage(
        density={"routed": found[1]["mone/density"]},
        active={"routed": found[1]["mone/active_share"]},
    )
    mlp = gated_mlps(config.model, config.mone)["routed"]
    every = budget_of(config, 512, replace(usage, active={})).activated
    unread = (1 - found[1]["mone/active_share"]) * mlp.width * config.model.hidden_size
    measured = budget_of(config, 512, usage).activated
    assert every - measured == pytest.approx(mlp.visited * unread)
    # A run of an earlier version did not count them.
    earlier = {key: column for key, column in run.columns.items() if key != "mone/active_share"}
    assert usage_of(config, replace(run, columns=earlier)) == replace(usage, active={})


def test_a_measured_budget_reads_the_density_of_each_kind_of_mlp(runs: Path) -> None:
    config, run = from_yaml(runs / "shared" / "config.yaml"), load_run(runs / "shared")
    last = records(runs / "shared")[-1]
    usage = usage_of(config, run)
    assert usage == Usage(
        density={kind: last[f"mone/{kind}/density"] for kind in ("shared", "dense")}
    )
    mlps = gated_mlps(config.model, config.mone)
    more = sum(
        mlps[kind].visited * 2 * config.model.hidden_size * (density - 0.25) * mlps[kind].width
        for kind, density in usage.density.items()
    )
    found = [budget_of(config, 512, one).activated for one in (Usage(), usage)]
    assert found[1] - found[0] == pytest.approx(more)


def test_straight_through_starts_with_the_same_loss_and_other_gradients(runs: Path) -> None:
    masked, through = records(runs / "masked"), records(runs / "through")
    assert masked[0]["loss"] == through[0]["loss"]
    assert masked[0]["grad_norm"] != through[0]["grad_norm"]
    assert records(runs / "through-balanced")[0]["loss"] == through[0]["loss"]
    for record in (*masked, *through):
        assert record["mone/density"] == 0.25
    for layout in ("ep2", "etp2"):
        for one, other in zip(through, records(runs / f"through-{layout}"), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["mone.straight_through=true", "mone.memory=packed"],
            "mone.memory: packed forgets the neurons that are not kept",
        ),
        (
            ["model.activation=drelu", "model.first_dense_layers=1"],
            "model.activation: drelu changes the up projection, which dense MLPs",
        ),
        (
            ["model.activation=drelu", "model.shared_expert_ffn_hidden_size=64"],
            "model.activation: drelu changes the up projection, which shared MLPs",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    found = list(problems(*overrides))
    assert len(found) == 1, found
    assert found[0].startswith(message)
