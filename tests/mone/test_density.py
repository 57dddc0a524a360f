"""Steered densities: the controller on plants of its own, and in runs of every layout."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.validate import validate
from mone_megatron.methods.density_step import DensityReading, DensityStep
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.mone.density import DensityController, DensityMeter, from_digits, to_digits
from mone_megatron.testing.launch import run_layouts


def test_the_coefficient_of_remoe_settles_within_one_alpha() -> None:
    controller = DensityController("alpha", 0.2, 1e-8, 1.0)
    # A model whose density falls with the coefficient: at 0.003 it is the target.
    right = 0.003
    values = []
    for _ in range(120):
        controller.observe(0.25 * (right / controller.value) ** 0.5, 0.25)
        values.append(controller.value)
    # From 1e-8 it is there after log(right / 1e-8) / log(1.2) steps.
    assert values[60] < right / 1.2
    assert values[69] > right / 1.2
    assert all(right / 1.2 <= value <= right * 1.2 for value in values[70:])


@pytest.mark.parametrize("raises", [False, True])
def test_the_squared_step_settles_without_a_jump(raises: bool) -> None:
    controller = DensityController("squared", 4.0, 0.9, 1.0, raises)
    for _ in range(3000):
        density = controller.value if raises else 0.1 / controller.value
        controller.observe(min(density, 1.0), 0.25)
    assert controller.value == pytest.approx(0.25 if raises else 0.4, rel=0.03)


def test_factors_are_those_of_the_papers() -> None:
    def factor(step: str, density: float, rate: float) -> float:
        function = DENSITY_STEPS[step].factor
        assert function is not None
        return function(DensityReading(density, 0.25, rate))

    assert factor("alpha", 0.3, 0.2) == pytest.approx(1.2)
    # ReMoE's code multiplies only while too many are active.
    assert factor("alpha", 0.25, 0.2) == factor("alpha", 0.1, 0.2) == pytest.approx(1 / 1.2)
    assert factor("squared", 0.75, 2.0) == pytest.approx(1 + 2 * 0.5**2)
    assert factor("squared", 0.05, 2.0) == pytest.approx(1 / (1 + 2 * 0.2**2))
    assert factor("squared", 0.25, 2.0) == 1.0
    assert DENSITY_STEPS["off"].factor is None


@pytest.mark.parametrize(
    "step", [step for step in DENSITY_STEPS if step.factor], ids=lambda step: step.name
)
def test_every_step_pulls_towards_the_target(step: DensityStep) -> None:
    assert step.factor is not None
    above, below = (step.factor(DensityReading(density, 0.25, 0.5)) for density in (0.5, 0.125))
    assert below < 1 < above
    assert step.factor(DensityReading(1.0, 0.25, 0.5)) >= above


def test_a_quantity_stays_within_its_bounds() -> None:
    controller = DensityController("alpha", 9.0, 0.5, 1.0)
    for _ in range(3):
        controller.observe(0.9, 0.25)
    assert controller.value == 1.0
    for _ in range(60):
        controller.observe(0.1, 0.25)
    # Not 0, from where nothing would come up again.
    assert controller.value > 0
    controller.observe(0.9, 0.25)
    assert controller.value == pytest.approx(1e-29)


def test_counts_are_exact_over_many_ranks() -> None:
    counts = torch.tensor([2**40 + 1, 2**40 + 4097])
    ranks = 512
    assert from_digits(sum(to_digits(counts) for _ in range(ranks))) == [  # type: ignore[arg-type]
        ranks * int(count) for count in counts
    ]


def test_a_meter_counts_only_when_it_is_asked_to() -> None:
    meter, mask, cpu = DensityMeter(), torch.eye(4).bool(), torch.device("cpu")
    meter.add(mask)
    assert meter.take(cpu).tolist() == [0, 0]
    meter.counting = True
    meter.add(mask)
    meter.add(mask[:2])
    assert meter.take(cpu).tolist() == [6, 24]
    assert meter.take(cpu).tolist() == [0, 0]


RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=4",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "logging.layer_interval=1", "checkpoint.interval=2", "mone.density.step=alpha",
)  # fmt: skip
STEERED = {
    "loss": (
        "mone.rule=nonzero", "mone.score=abs_product", "model.activation=relu",
        "model.sparsity_loss=l1", "mone.density.start=0.001",
    ),
    "p": ("mone.rule=mass", "mone.density.steers=p", "mone.density.rate=0.05"),
    "tau": (
        "mone.rule=threshold", "mone.density.steers=tau", "mone.density.step=squared",
        "mone.density.rate=3",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("density")
    one = {f"{name}-one": (*RUN, *overrides) for name, overrides in STEERED.items()}
    for name, overrides in STEERED.items():
        saved = folder / f"{name}-one" / "checkpoints" / "step_00000002"
        one[f"{name}-resumed"] = (*RUN, *overrides, f"checkpoint.resume={saved}")
    run_layouts(one, processes=1, folder=folder)
    two = {f"{name}-ep2": (*RUN, *o, "parallel.expert=2") for name, o in STEERED.items()}
    two["loss-pp2"] = (*RUN, *STEERED["loss"], "parallel.pipeline=2")
    two["loss-etp2"] = (
        *RUN, *STEERED["loss"], "parallel.tensor=2", "parallel.expert_tensor=2",
    )  # fmt: skip
    run_layouts(two, processes=2, folder=folder)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", STEERED)
def test_the_density_of_a_step_is_the_true_one_and_moves_the_quantity(
    runs: Path, name: str
) -> None:
    found = records(runs / f"{name}-one")
    for record, after in itertools.pairwise(found):
        density = record["mone/step_density"]
        # The panel means over experts, which have different numbers of tokens.
        assert density == pytest.approx(record["mone/density"], rel=0.02)
        rises = (density > 0.25) != (name == "p")
        assert (after["mone/steered"] > record["mone/steered"]) == rises
    if name == "loss":
        assert found[1]["mone/steered"] == pytest.approx(0.001 * 1.2)


@pytest.mark.parametrize("name", STEERED)
def test_it_resumes_bitwise(runs: Path, name: str) -> None:
    whole, resumed = records(runs / f"{name}-one")[2:], records(runs / f"{name}-resumed")
    for key in ("loss", "grad_norm", "mone/step_density", "mone/steered"):
        assert [record[key] for record in resumed] == [record[key] for record in whole]


@pytest.mark.parametrize("layout", ["loss-ep2", "loss-pp2", "loss-etp2", "p-ep2", "tau-ep2"])
def test_layouts_agree(runs: Path, layout: str) -> None:
    name = layout.split("-")[0]
    for one, other in zip(records(runs / f"{name}-one"), records(runs / layout), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["mone/step_density"] == pytest.approx(one["mone/step_density"], rel=1e-4)
        assert other["mone/steered"] == pytest.approx(one["mone/steered"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["step=alpha"],
            "mone.density.steers: sparsity_coeff decides no density with mone.rule=topk",
        ),
        (
            ["step=alpha", "steers=theta"],
            "mone.density.steers: 'theta' is nothing that mone.rule=topk has; use sparsity_coeff",
        ),
        (["step=alfa"], "mone.density.step: the text 'alfa' is not one of"),
        (["target=0.2"], "mone.density.target: 0.2 has no effect with mone.density.step=off"),
        (["start=1"], "mone.density.start: 1.0 has no effect with mone.density.step=off"),
        (["rate=0.1"], "mone.density.rate: 0.1 has no effect with mone.density.step=off"),
        (["cap=0.5"], "mone.density.cap: 0.5 has no effect with mone.density.step=off"),
        (["steers=p"], "mone.density.steers: p has no effect with mone.density.step=off"),
        (["rate=0"], "mone.density.rate: 0 is not positive"),
    ],
)
def test_what_cannot_be_steered_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    assert problem(*(f"mone.density.{override}" for override in overrides)).startswith(message)


NONZERO = ("mone.density.step=alpha", "mone.rule=nonzero", "mone.score=abs_product")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (NONZERO, "mone.density.steers: sparsity_coeff needs a loss; set model.sparsity_loss=l1"),
        (
            (*NONZERO, "model.sparsity_loss=l1", "model.sparsity_coeff=0.1"),
            "model.sparsity_coeff: 0.1 is what mone.density steers; use 0",
        ),
        (
            (*NONZERO, "model.sparsity_loss=l1", "mone.keep_ratio=1"),
            "mone.density.step: alpha measures no density where mone.keep_ratio=1",
        ),
        (
            ("mone.density.step=alpha", "mone.rule=mass", "mone.density.steers=p",
             "mone.rule_options.p=0.4"),
            "mone.rule_options.p: 0.4 is fixed, and mone.density steers it",
        ),
        (
            ("mone.rule=mass", "mone.rule_options.p=0.4", "mone.rule_options.rate=0.1"),
            "mone.rule_options.rate: 0.1 has no effect with mone.rule_options.p=0.4, which stays",
        ),
        (
            ("mone.density.step=alpha", "mone.rule=threshold", "mone.density.steers=tau",
             "mone.rule_options.rate=0.1"),
            "mone.rule_options.rate: 0.1 has no effect with mone.density, which steers tau",
        ),
        (
            ("mone.density.step=alpha", "mone.rule=mass", "mone.density.steers=p",
             "mone.density.cap=0.5"),
            "mone.density.cap: 0.5 has no effect with mone.density.steers=p, whose largest value",
        ),
        (
            ("mone.density.step=alpha", "mone.rule=mass", "mone.density.steers=p",
             "mone.density.start=2"),
            "mone.density.start: 2 is more than p can be with mone.rule=mass; use 1 or less",
        ),
    ],
)  # fmt: skip
def test_what_else_must_be_there_is_told(overrides: tuple[str, ...], message: str) -> None:
    assert problem(*overrides).startswith(message)


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(compose(["experiment=tiny_mone", "device=cpu", *overrides]), world_size=1)
    (found,) = caught.value.problems
    return found
