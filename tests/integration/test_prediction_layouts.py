"""Multi-token prediction trains alike in every layout, resumes to the last bit, and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
from close_records import names_in_all_layouts
from record_losses import SETTINGS, prepare_corpus, read_records

from mone_megatron.hf.checks import check_export
from mone_megatron.hf.export import choose_architecture, export
from mone_megatron.hf.source import open_source
from mone_megatron.testing.launch import run_layouts

STEPS = 4
# Only a flip of two scores that are equal but for rounding moves more (test_layouts_agree).
TOLERANCE = 1e-5
DEPTH = "model.mtp.depth=2"
LOSSES = ("mtp/loss", "mtp/loss/depth_1", "mtp/loss/depth_2")
# Matrices and tables of tokens go by different optimizers: copies of a table must go alike.
MUON = ("optim.name=muon", "parallel.distributed_optimizer=false")
# A loss of our own, beside megatron-core's, which is told of each layer.
RELU = ("model.router.kind=relu", "model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
DENSE = ("model.num_experts=0", "mone.apply_to=[dense]")
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "plain": (
        (),
        {
            "ep2": ("parallel.expert=2",),
            "tp2_recompute": ("parallel.tensor=2", "train.recompute=full"),
            "pp2": ("parallel.pipeline=2",),
            "pp2_interleaved": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        },
    ),
    "muon": (MUON, {"pp2": ("parallel.pipeline=2",)}),
    "dense": (DENSE, {"tp2": ("parallel.tensor=2",)}),
    "relu": (RELU, {"ep2": ("parallel.expert=2",)}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    common = ("experiment=tiny_mone", *SETTINGS, *prepare_corpus(folder), f"train.steps={STEPS}")
    common = (*common, "checkpoint.interval=2", "checkpoint.keep_last=2", DEPTH)
    common = (*common, "train.global_batch_size=4")
    middle = f"checkpoint.resume={folder / 'plain-one' / 'checkpoints' / 'step_00000002'}"
    one = {f"{case}-one": (*common, *parts) for case, (parts, _) in CASES.items()}
    run_layouts(one | {"resumed": (*common, middle)}, processes=1, folder=folder)
    two = {
        f"{case}-{name}": (*common, *parts, *layout)
        for case, (parts, layouts) in CASES.items()
        for name, layout in layouts.items()
    }
    two["resumed-pp2"] = (*common, middle, "parallel.pipeline=2")
    run_layouts(two, processes=2, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("case", "layout"), [(case, name) for case, (_, layouts) in CASES.items() for name in layouts]
)
def test_layouts_train_alike(runs: Path, case: str, layout: str) -> None:
    reference, records = (read_records(runs / f"{case}-{name}") for name in ("one", layout))
    assert len(reference) == len(records) == STEPS
    keys = ["loss", "grad_norm", "mone/balance_loss", *LOSSES]
    keys += {"dense": [], "relu": ["router/sparsity_loss"]}.get(
        case, ["router/load_balancing_loss"]
    )
    for expected, actual in zip(reference, records, strict=True):
        assert names_in_all_layouts(actual) == names_in_all_layouts(expected)
        for key in keys:
            assert actual[key] == pytest.approx(expected[key], rel=TOLERANCE), key


def test_its_layers_are_counted_and_told_after_the_others(runs: Path) -> None:
    record = read_records(runs / "plain-one")[-1]
    # Four layers, and one for each depth.
    for name in ("mone/load_entropy", "router/tokens_per_expert_max", "mone/balance_loss"):
        told = [key for key in record if key.startswith(f"{name}/layer_")]
        assert told == [f"{name}/layer_{layer}" for layer in range(1, 7)]
    assert record["mtp/loss"] == pytest.approx(sum(record[key] for key in LOSSES[1:]) / 2)


def test_a_run_goes_on_to_the_last_bit(runs: Path) -> None:
    whole, resumed = (read_records(runs / name) for name in ("plain-one", "resumed"))
    for key in ("loss", "grad_norm", *LOSSES):
        assert [record[key] for record in resumed] == [record[key] for record in whole[2:]]
    moved = read_records(runs / "resumed-pp2")
    for expected, actual in zip(whole[2:], moved, strict=True):
        for key in ("loss", *LOSSES):
            assert actual[key] == pytest.approx(expected[key], rel=1e-6)


def test_an_export_says_that_its_layers_are_left_out(runs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source = open_source(runs / "plain-pp2", say=said.append)
    assert said == [
        f"checkpoint {source.checkpoint.path}: the layers that predict later tokens "
        "(model.mtp.depth=2) are left out; the next token needs none of them"
    ]
    checked: list[bool] = []

    def check(folder: Path) -> str:
        checked.append(check_export(source, folder, dtype=None).holds)
        return ""

    exported = export(
        source,
        tmp_path / "hf",
        architecture=choose_architecture(source, "auto"),
        dtype=None,
        shard_bytes=10**9,
        check=check,
        progress=said.append,
    )
    assert checked == [True]
    assert "depth: 2" in (exported.folder / "training_config.yaml").read_text(encoding="utf-8")
