"""An MoE that anneals into MoNE: what each step keeps, resumed and on two layouts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from mone_megatron.hf.source import open_source
from mone_megatron.methods.rules import RULES
from mone_megatron.testing.launch import run_layouts

_QUICK = [
    "device=cpu",
    "model.num_layers=2",
    "train.steps=6",
    "logging.layer_interval=1",
    "logging.report=false",
    "logging.wandb.mode=disabled",
    "checkpoint.interval=3",
    "checkpoint.keep_last=9",
]
# All neurons in the first step, half of them from the second on: ratios that every rule takes.
_HALVED = ["mone.keep_ratio=0.5", "mone.keep_ratio_schedule=linear", "mone.keep_ratio_steps=1"]
_SCHEDULE = ["mone.keep_ratio_schedule=linear", "mone.keep_ratio_steps=4"]
# A balance loss that has a gradient also when all neurons are kept.
_SCHEDULE += ["mone.balance.normalize=false", "mone.balance.coeff=0.1"]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annealed")
    annealed = ["experiment=tiny_mone", *_QUICK, *_SCHEDULE]
    # Started from the third step's checkpoint under another name: what a requeued run does.
    taken_up = [*annealed, f"checkpoint.resume={folder}/annealed/checkpoints/step_00000003"]
    jobs = {
        "plain": ["experiment=tiny_moe", *_QUICK],
        "annealed": annealed,
        "taken_up": taken_up,
    }
    run_layouts(jobs, processes=1, folder=folder)
    run_layouts({"spread": [*annealed, "parallel.expert=2"]}, processes=2, folder=folder)
    return folder


def test_each_step_keeps_what_the_schedule_says(runs: Path) -> None:
    found = records(runs / "annealed")
    ratios = [record["mone/keep_ratio"] for record in found]
    assert ratios == pytest.approx([1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25])
    # All neurons at first: the dense experts' step, bit for bit, with nothing to balance or count.
    plain = records(runs / "plain")[0]
    assert (found[0]["loss"], found[0]["grad_norm"]) == (plain["loss"], plain["grad_norm"])
    assert [key for key in found[0] if key.startswith("mone/")] == ["mone/keep_ratio"]
    assert "mone/balance_loss" in found[1]
    masses = [record["mone/mass_kept"] for record in found[1:]]
    assert all(later < earlier for earlier, later in pairwise(masses[:4]))
    ideal = [record["tflops_ideal"] * record["step_seconds"] for record in found]
    assert ideal[0] > ideal[2] > ideal[4]
    assert ideal[4] == pytest.approx(ideal[5])
    assert "mone/keep_ratio" not in records(runs / "plain")[0]


def test_taken_up_it_goes_on_bitwise(runs: Path) -> None:
    whole, rest = records(runs / "annealed")[3:], records(runs / "taken_up")
    assert [record["loss"] for record in rest] == [record["loss"] for record in whole]
    assert [record["mone/keep_ratio"] for record in rest] == [
        record["mone/keep_ratio"] for record in whole
    ]


def test_layouts_agree(runs: Path) -> None:
    ours, theirs = (
        [record["loss"] for record in records(runs / name)] for name in ("annealed", "spread")
    )
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_a_checkpoint_is_used_with_its_own_ratio(runs: Path) -> None:
    store = runs / "annealed" / "checkpoints"
    for step, ratio in ((3, 0.625), (6, 0.25)):
        source = open_source(store / f"step_{step:08d}", say=lambda message: None)
        assert source.mone.keep_ratio == pytest.approx(ratio)


def test_rules_that_learn_begin_when_neurons_are_left_out(tmp_path: Path) -> None:
    names = [rule.name for rule in RULES if rule.advance is not None]
    jobs = {
        name: ["experiment=tiny_mone", *_QUICK, "train.steps=3", *_HALVED, f"mone.rule={name}"]
        for name in names
    }
    run_layouts(jobs, processes=1, folder=tmp_path)
    for name in names:
        kept = [record.get("mone/density") for record in records(tmp_path / name)]
        assert kept[0] is None
        assert all(0.3 < density < 0.9 for density in kept[1:] if density is not None)
        assert None not in kept[1:], name
