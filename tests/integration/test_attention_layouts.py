"""Windows, sinks, documents apart and context parallelism train alike in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_losses import SETTINGS, prepare_corpus, read_records

from mone_megatron.testing.launch import run_layouts

STEPS = 4
# Only a flip of two scores that are equal but for rounding moves more (test_layouts_agree).
TOLERANCE = 1e-5
ALL = (
    "data.reset_attention=true",
    "model.attention_window=48",
    "model.full_attention_every=2",
    "model.attention_sink=learnable",
)
CONTEXT = "parallel.context=2"
# Which parts are on, and the layouts to try them in: of two processes, and those ON_FOUR.
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    # Long enough for the weights to be kept, but with context parallelism.
    "kept_weights": (
        ("train.seq_length=200",),
        {
            "tp2": ("parallel.tensor=2",),
            "ep2_recompute": ("parallel.expert=2", "train.recompute=selective"),
            "cp2": (CONTEXT,),
        },
    ),
    "plain": ((), {"cp2": (CONTEXT,), "cp2_dp2_on_4": (CONTEXT,)}),
    "all": (
        ALL,
        {
            "cp2": (CONTEXT,),
            "tp2": ("parallel.tensor=2",),
            "pp2": ("parallel.pipeline=2",),
            "ep2_recompute": ("parallel.expert=2", "train.recompute=full"),
            "cp4_on_4": ("parallel.context=4",),
            "cp2_tp2_on_4": (CONTEXT, "parallel.tensor=2"),
            "cp2_ep2_on_4": (CONTEXT, "parallel.expert=2", "train.recompute=full"),
            "cp2_pp2_on_4": (CONTEXT, "parallel.pipeline=2"),
        },
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    common = ("experiment=tiny_mone", *SETTINGS, *prepare_corpus(folder), f"train.steps={STEPS}")
    common = (*common, "model.num_layers=2", "train.global_batch_size=4")
    one = {f"{case}-one": (*common, *parts) for case, (parts, _) in CASES.items()}
    run_layouts(one, processes=1, folder=folder)
    for processes in (2, 4):
        jobs = {
            f"{case}-{name}": (*common, *parts, *layout)
            for case, (parts, layouts) in CASES.items()
            for name, layout in layouts.items()
            if name.endswith("_on_4") is (processes == 4)
        }
        run_layouts(jobs, processes=processes, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("case", "layout"), [(case, name) for case, (_, layouts) in CASES.items() for name in layouts]
)
def test_layouts_train_alike(runs: Path, case: str, layout: str) -> None:
    reference, records = (read_records(runs / f"{case}-{name}") for name in ("one", layout))
    assert len(reference) == len(records) == STEPS
    for expected, actual in zip(reference, records, strict=True):
        for key in ("loss", "grad_norm", "router/load_balancing_loss", "mone/balance_loss"):
            assert actual[key] == pytest.approx(expected[key], rel=TOLERANCE), key


def test_the_parts_change_what_is_computed(runs: Path) -> None:
    plain, changed = (read_records(runs / f"{case}-one") for case in ("plain", "all"))
    assert plain[0]["loss"] != changed[0]["loss"]
