"""Exports of models whose router is not megatron-core's own, beside other rules, gates and experts.

Each router alone, with the usual rest, is exported by tests/methods/test_methods_train.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported_models import check_generation
from test_export import export_run, open_run
from test_import import import_model
from transformers import AutoConfig, AutoModelForCausalLM

from mone_megatron.config.load import compose
from mone_megatron.hf import checks, export
from mone_megatron.hf.experts_mone import experts_modules
from mone_megatron.hf.importing import model_overrides
from mone_megatron.hf.loading import build_from_checkpoint, load_model
from mone_megatron.testing.launch import run_layouts

QUIET = (
    "device=cpu", "data.max_megabytes=0.2", "train.steps=2", "checkpoint.interval=2",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
)  # fmt: skip
OWN_BALANCE = ("model.router.balance=[none]", "model.router.balance_coeff=[0.0]")
RUNS = {
    "relu-moe": ("experiment=tiny_moe", "model.router.kind=relu", *OWN_BALANCE),
    "relu-pooled-low-rank": (
        "experiment=tiny_mone", "model.router.kind=relu", *OWN_BALANCE, "mone.rule=pooled",
        "model.gate=low_rank",
    ),
    "routing_free-mass-split": (
        "experiment=tiny_mone", "model.router.kind=routing_free", "model.router.rank=3",
        "model.router.threshold=0.1", *OWN_BALANCE, "mone.rule=mass", "model.gate=split",
    ),
    "deco-mass": (
        "experiment=tiny_mone", "model.router.kind=deco", "model.router.options.scale=0.4",
        *OWN_BALANCE, "mone.rule=mass", "model.shared_expert_ffn_hidden_size=32",
    ),
    "top_p-nonzero-drelu": (
        "experiment=tiny_mone", "model.router.kind=top_p", "model.router.options.top_p=0.3",
        "mone.rule=nonzero", "mone.score=abs_product", "model.activation=drelu",
    ),
    "autonomy-moe-sigmoid": (
        "experiment=tiny_moe", "model.router.kind=autonomy", "model.router.score_function=sigmoid",
        "model.shared_expert_ffn_hidden_size=32",
    ),
    "expert_choice": ("experiment=tiny_mone", "model.router.kind=expert_choice"),
}  # fmt: skip
EXPORTED = [name for name in RUNS if name != "expert_choice"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    jobs = {name: (*run, *QUIET) for name, run in RUNS.items()}
    run_layouts(jobs, processes=1, folder=folder)
    for name in EXPORTED:
        export_run(open_run(folder / name), folder / f"{name}-hf")
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_logits_experts_and_neurons_are_those_of_training(runs: Path, name: str) -> None:
    source = open_run(runs / name)
    found = checks.check_export(source, runs / f"{name}-hf", dtype=None)
    assert found.holds, found.describe()
    config = AutoConfig.from_pretrained(runs / f"{name}-hf", trust_remote_code=True)
    assert config.router_kind == source.model.router.kind
    # The code beside the weights holds this router alone.
    code = (runs / f"{name}-hf" / "expert_router.py").read_text(encoding="utf-8")
    assert f'name="{config.router_kind}"' in code
    with pytest.raises(ValueError, match=f"router={config.router_kind}"):
        export.choose_architecture(source, "qwen3_moe")


@pytest.mark.parametrize("name", EXPORTED)
def test_it_generates_what_it_reads_at_once(runs: Path, name: str) -> None:
    check_generation(runs / f"{name}-hf")


@pytest.mark.parametrize("name", EXPORTED)
def test_an_import_comes_back_to_it(runs: Path, name: str, tmp_path: Path) -> None:
    folder = runs / f"{name}-hf"
    again = open_run(import_model(folder, tmp_path / "ours"))
    was = open_run(runs / name)
    assert again.model.router_settings == was.model.router_settings
    assert again.model.router.kind == was.model.router.kind
    # What it prints for a run is a configuration, and that of the same router.
    keys = model_overrides(again.model, again.mone)
    printed = compose(["experiment=tiny_moe", *keys]).model
    assert printed.router_settings == was.model.router_settings
    assert (printed.router.kind, printed.router.balance) == (
        was.model.router.kind,
        was.model.router.balance,
    )
    export_run(again, tmp_path / "back")
    for name in ("config.json", "expert_router.py"):
        was_text, now_text = ((one / name).read_text() for one in (folder, tmp_path / "back"))
        if name == "config.json":
            was_text, now_text = (
                {key: json.loads(text)[key] for key in ("router_kind", "router_settings")}
                for text in (was_text, now_text)
            )
        assert now_text == was_text
    now = build_from_checkpoint(again).state_dict()
    for key, tensor in build_from_checkpoint(was).state_dict().items():
        assert torch.equal(now[key], tensor), key


def test_experts_that_no_token_chose_are_not_computed(runs: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        runs / "top_p-nonzero-drelu-hf", trust_remote_code=True
    ).eval()
    tokens = torch.arange(1, 13).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        for experts in experts_modules(model):
            index_NK = torch.stack([torch.arange(experts.num_experts)] * 3)
            weights_NK = torch.zeros(3, experts.num_experts)
            weights_NK[1, 2] = 0.5
            rows = torch.randn(3, experts.hidden_dim, generator=torch.Generator().manual_seed(0))
            output = experts(rows, index_NK, weights_NK)
            assert not output[0].any()
            assert not output[2].any()
            alone = experts(rows[1:2], torch.tensor([[2]]), torch.tensor([[0.5]]))
            torch.testing.assert_close(output[1:2], alone)
            # Not even one that would spoil the others.
            experts.down_proj[3] = torch.nan
            assert experts(rows, index_NK, weights_NK).isfinite().all()
            # No expert at all.
            assert not experts(rows, index_NK, torch.zeros_like(weights_NK)).any()
    assert expected.isfinite().all()


def test_a_router_that_looks_ahead_is_refused_wherever_a_run_is_read(runs: Path) -> None:
    source = open_run(runs / "expert_choice")
    says = "model.router.kind: expert_choice looks at other tokens outside training"
    with pytest.raises(ValueError, match=says):
        export.choose_architecture(source, "auto")
    with pytest.raises(ValueError, match=says):
        load_model(str(runs / "expert_choice"))


@pytest.mark.parametrize(
    "override",
    [
        "model.attention_window=4",
        "mone.rule=statistical mone.score=signed_gate mone.rule_options.shifted=true",
    ],
)
def test_so_are_other_models_that_exports_cannot_hold(override: str, tmp_path: Path) -> None:
    run = ("experiment=tiny_mone", *override.split(), *QUIET)
    run_layouts({"run": run}, processes=1, folder=tmp_path)
    with pytest.raises(ValueError, match="such models cannot be exported"):
        load_model(str(tmp_path / "run"))
