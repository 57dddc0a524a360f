"""Every method of the registries trains: the same in every layout, and exactly on after a save.

The reference of each is its own run on one process.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.activations import ACT2FN

from mone_megatron.hf import checks, export
from mone_megatron.hf.export import Exported
from mone_megatron.hf.settings import hidden_act
from mone_megatron.hf.source import open_source
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.testing.each_method import REGISTRIES, needed
from mone_megatron.testing.launch import run_layouts

QUIET = ("logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none")
# Two layers and two microbatches: a method is the same in each, and here are hundreds of runs.
RUN = (
    "experiment=tiny_mone", *QUIET, "device=cpu", "model.num_layers=2", "data.max_megabytes=0.2",
    "train.steps=4", "train.global_batch_size=4", "checkpoint.interval=2",
)  # fmt: skip
METHODS = {
    f"{key}-{name}": f"{key}={name}"
    for registry, key, usual in REGISTRIES
    for name in registry.names
    if name != usual
}
# What is chosen beside the registries' methods, or steers one of them, with what it needs.
BESIDE = {
    "mone.straight_through=true": (),
    **{
        f"model.sparsity_loss={loss.name}": ("model.sparsity_coeff=0.1",)
        for loss in SPARSITY_LOSSES
        if loss.function is not None
    },
    **{
        f"mone.density.step={step.name}": (
            "mone.rule=mass", "mone.density.steers=p", "mone.density.target=0.3",
        )
        for step in DENSITY_STEPS
        if step.factor is not None
    },
}  # fmt: skip
METHODS |= {override.replace("=", "-"): override for override in BESIDE}


def sharded(override: str) -> bool:
    key, _, name = override.partition("=")
    if key == "optim.name":
        return not OPTIMIZERS[name].whole
    if key == "model.router.kind" and ROUTERS[name].reads_batch:
        return False
    if key == "mone.density.step":
        return RULES["mass"].exchange != "refused"
    return key != "mone.rule" or RULES[name].exchange != "refused"


def pools(override: str) -> bool:
    key, _, name = override.partition("=")
    return key == "mone.rule" and RULES[name].pools


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> dict[str, str]:
    """The methods that the chosen tests ask for, so that `-k` trains those alone."""
    asked = {
        item.callspec.params["method"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == request.path
        and hasattr(item, "callspec")
    }
    return {name: override for name, override in METHODS.items() if name in asked}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    one: dict[str, tuple[str, ...]] = {}
    two: dict[str, tuple[str, ...]] = {}
    for name, override in chosen.items():
        run = (*RUN, override, *BESIDE.get(override, needed(override)))
        if override.startswith("optim.name=") and not sharded(override):
            run = (*run, "parallel.distributed_optimizer=false")
        one[f"{name}-one"] = run
        saved = folder / f"{name}-one" / "checkpoints" / "step_00000002"
        one[f"{name}-resumed"] = (*run, f"checkpoint.resume={saved}", "checkpoint.interval=0")
        # What else is of a run is saved by one process in the middle, by two at the end.
        run = (*run, "checkpoint.interval=4")
        if not pools(override):
            two[f"{name}-ep2"] = (*run, "parallel.expert=2")
        if sharded(override):
            two[f"{name}-etp2"] = (*run, "parallel.tensor=2", "parallel.expert_tensor=2")
    # All methods together take longer than the usual limit on a busy machine.
    run_layouts(one, processes=1, folder=folder, timeout=3600)
    if two:
        run_layouts(two, processes=2, folder=folder, timeout=3600)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_it_resumes_bitwise(runs: Path, method: str) -> None:
    whole, resumed = records(runs / f"{method}-one"), records(runs / f"{method}-resumed")
    assert [record["step"] for record in whole] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in resumed] == [record[key] for record in whole[2:]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["ep2", "etp2"])
def test_layouts_agree(runs: Path, method: str, layout: str) -> None:
    if layout == "etp2" and not sharded(METHODS[method]):
        pytest.skip("the method refuses such layouts by its key; tested by itself")
    if layout == "ep2" and pools(METHODS[method]):
        pytest.skip("a token's experts are on one rank; tested by itself")
    for expected, record in zip(
        records(runs / f"{method}-one"), records(runs / f"{method}-{layout}"), strict=True
    ):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_its_export_is_the_same_model(runs: Path, method: str, tmp_path: Path) -> None:
    """Logits and kept neurons of the export are those of the training model."""
    source = open_source(runs / f"{method}-one", say=lambda message: None)

    def exported() -> Exported:
        return export.export(
            source,
            tmp_path / "hf",
            architecture=export.choose_architecture(source, "auto"),
            dtype=None,
            shard_bytes=10**9,
            check=lambda folder: "",
            progress=lambda message: None,
        )

    key, _, name = METHODS[method].partition("=")
    if key == "mone.rule" and not RULES[name].causal:
        with pytest.raises(ValueError, match=f"mone.rule: {name} looks at other tokens"):
            exported()
    elif key == "model.router.kind" and not ROUTERS[name].causal:
        with pytest.raises(ValueError, match=f"model.router.kind: {name} looks at other tokens"):
            exported()
    elif key == "model.router.kind" and ROUTERS[name].reference is not None:
        with pytest.raises(ValueError, match=f"model.router.kind: {name} is a class of megatron"):
            exported()
    elif key == "model.activation" and hidden_act(name) not in ACT2FN:
        with pytest.raises(ValueError, match=f"model.activation: transformers has no {name}"):
            exported()
    else:
        exported()
        found = checks.check_export(source, tmp_path / "hf", dtype=None)
        assert found.holds, found.describe()


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_what_is_trained(runs: Path, chosen: dict[str, str], method: str) -> None:
    losses = {name: [record["loss"] for record in records(runs / f"{name}-one")] for name in chosen}
    assert all(losses[method] != losses[other] for other in chosen if other != method)
