"""Every method of the registries trains: the same in every layout, and exactly on after a save.

The reference of each is its own run on one process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from mone_megatron.config import Config, ConfigError, validate
from mone_megatron.config.load import compose, from_yaml
from mone_megatron.config.mone import MoNEConfig
from mone_megatron.hf import checks, decode_mone, export
from mone_megatron.hf.card import model_card
from mone_megatron.hf.experts_mone import ExpertsModule, experts_modules
from mone_megatron.hf.export import Exported
from mone_megatron.hf.settings import hidden_act
from mone_megatron.hf.source import open_source
from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.losses import LOSSES
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rule import STATE_PREFIX
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.scores import SCORES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.planning.parameters import count_parameters
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


# On two processes. Each method trains in the first two. The others, which split layers and
# sequences rather than experts, are tried with each router, and with the rest in `make test-slow`.
LAYOUTS = {
    "ep2": ("parallel.expert=2",),
    "etp2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
    "pp2": ("parallel.pipeline=2",),
    "cp2": ("parallel.context=2",),
}
OF_ALL = ("ep2", "etp2")
IN_LAYOUTS = [
    pytest.param(
        method,
        layout,
        marks=()
        if layout in OF_ALL or override.startswith("model.router.kind=")
        else pytest.mark.slow,
    )
    for method, override in METHODS.items()
    for layout in LAYOUTS
]


def refusing_key(override: str, layout: str) -> str | None:
    """The key by which a method refuses a layout, as the method declares it; None where it fits."""
    key, _, name = override.partition("=")
    if key == "optim.name" and OPTIMIZERS[name].whole and layout == "etp2":
        return "optim.name"
    if key == "model.router.kind" and ROUTERS[name].reads_batch and layout in ("etp2", "cp2"):
        return "model.router.kind"
    if key not in ("mone.rule", "mone.density.step"):
        return None
    rule = RULES["mass" if key == "mone.density.step" else name]
    if rule.exchange == "refused" and layout == "etp2":
        return "parallel.expert_tensor"
    if rule.pools and layout == "ep2":
        return "parallel.expert"
    return "mone.rule" if rule.reads_batch and layout == "cp2" else None


def settings(override: str) -> tuple[str, ...]:
    """The whole run of a method, but where it goes."""
    run = (*RUN, override, *BESIDE.get(override, needed(override)))
    whole = override.startswith("optim.name=") and OPTIMIZERS[override.partition("=")[2]].whole
    return (*run, "parallel.distributed_optimizer=false") if whole else run


def forbids_packed(override: str) -> bool:
    """Whether a method needs what packed memory forgets, or may keep all of it."""
    key, _, name = override.partition("=")
    if key == "mone.balance.kind":
        return LOSSES[name].signed
    if key in ("mone.rule", "mone.density.step"):
        rule = RULES["mass" if key == "mone.density.step" else name]
        return rule.most_kept(rule.budget(0.25, 64)) == 64
    return override == "mone.straight_through=true"


def problems_of(config: Config, world_size: int = 1) -> Sequence[str]:
    """What is refused of a configuration."""
    try:
        validate(config, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return ()


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def asked(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """The parameters of the chosen tests, so that `-k` trains what these need alone."""
    return [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == request.path
        and hasattr(item, "callspec")
    ]


@pytest.fixture(scope="module")
def chosen(asked: list[dict[str, str]]) -> dict[str, str]:
    """The methods that the chosen tests ask for."""
    names = {params["method"] for params in asked}
    return {name: override for name, override in METHODS.items() if name in names}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    asked: list[dict[str, str]],
    chosen: dict[str, str],
) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    one: dict[str, tuple[str, ...]] = {}
    two: dict[str, tuple[str, ...]] = {}
    for name, override in chosen.items():
        run = settings(override)
        one[f"{name}-one"] = run
        saved = folder / f"{name}-one" / "checkpoints" / "step_00000002"
        one[f"{name}-resumed"] = (*run, f"checkpoint.resume={saved}", "checkpoint.interval=0")
        for params in asked:
            layout = params.get("layout", "")
            if params["method"] == name and layout and not refusing_key(override, layout):
                # What else is of a run is saved by one process in the middle, by two at the end.
                two[f"{name}-{layout}"] = (*run, "checkpoint.interval=4", *LAYOUTS[layout])
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


@pytest.mark.parametrize(("method", "layout"), IN_LAYOUTS)
def test_layouts_agree(runs: Path, method: str, layout: str) -> None:
    """Where a method cannot, it is refused by the key that it declares."""
    override = METHODS[method]
    if key := refusing_key(override, layout):
        found = problems_of(compose([*settings(override), *LAYOUTS[layout]]), world_size=2)
        assert {line.split(":")[0] for line in found} == {key}
        return
    for expected, record in zip(
        records(runs / f"{method}-one"), records(runs / f"{method}-{layout}"), strict=True
    ):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_packed_memory_is_refused_where_it_cannot_be(method: str) -> None:
    override = METHODS[method]
    packed = compose([*settings(override), "mone.memory=packed"])
    told = {line.split(":")[0] for line in problems_of(packed)}
    assert told == ({"mone.memory"} if forbids_packed(override) else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [name for name, override in METHODS.items() if not forbids_packed(override)]
)
def test_packed_memory_trains_the_same(runs: Path, method: str, tmp_path: Path) -> None:
    packed = (*settings(METHODS[method]), "mone.memory=packed", "checkpoint.interval=0")
    run_layouts({method: packed}, processes=1, folder=tmp_path)
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in records(tmp_path / method)] == [
            record[key] for record in records(runs / f"{method}-one")
        ]


@pytest.mark.parametrize("method", METHODS)
def test_the_planner_counts_its_weights(runs: Path, method: str) -> None:
    """Planned are those that are there; what a rule learns is no weight."""
    folder = runs / f"{method}-one"
    source = open_source(folder, say=lambda message: None)
    there = sum(
        math.prod(info.shape)
        for name, info in source.weights.items()
        if not name.rpartition(".")[2].startswith(STATE_PREFIX)
    )
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    counted = count_parameters(source.model, source.mone, facts["vocab_size"], padded=True)
    assert counted.total == there
    planned = count_parameters(source.model, source.mone, facts["vocab_size"])
    assert facts["parameters"]["total"] == planned.total


@pytest.mark.parametrize("method", METHODS)
def test_what_it_used_stands_beside_what_was_planned(runs: Path, method: str) -> None:
    """Of four steps the last is the last quarter."""
    folder = runs / f"{method}-one"
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    config, last = from_yaml(folder / "config.yaml"), records(folder)[-1]
    model, planned = config.model, facts["parameters"]
    rule, router = RULES[config.mone.rule], ROUTERS[model.router.kind]
    if rule.fixed_count and router.fixed_count:
        assert "measured" not in facts
        return
    found = facts["measured"]
    kept, density = round(config.mone.keep_ratio * model.expert_ffn_hidden_size), None
    experts: float = model.experts_per_token
    if not rule.fixed_count:
        density = last["mone/density"]
        assert found["density"] == {"routed": density}
    if not router.fixed_count:
        tokens = config.train.global_batch_size * config.train.seq_length
        experts = last["router/tokens_per_expert_mean"] * model.num_experts / tokens
        assert found["experts_per_token"] == pytest.approx(experts)
    matrix = model.hidden_size * model.expert_ffn_hidden_size
    share = kept / model.expert_ffn_hidden_size

    def used(share: float, gate: int) -> float:
        return model.num_layers * matrix * (gate + (3 - gate) * share)

    now = share if density is None else density
    for name, gate in (("activated_gate_counted", 1), ("activated_neurons_only", 0)):
        more = experts * used(now, gate) - model.experts_per_token * used(share, gate)
        assert found["parameters"][name] == pytest.approx(planned[name] + more, abs=1)
    more = (experts - model.experts_per_token) * used(1, 0)
    assert found["parameters"]["activated_all_neurons"] == pytest.approx(
        planned["activated_all_neurons"] + more, abs=1
    )


@pytest.mark.parametrize("method", METHODS)
def test_its_export_is_the_same_model(
    runs: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and kept neurons of the export are those of the training model.

    Decoding by the rows of kept neurons writes the same text, or is refused by its name.
    """
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
        card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
        facts = json.loads((runs / f"{method}-one" / "run.json").read_text(encoding="utf-8"))
        used = facts.get("measured", facts)["parameters"]["activated_gate_counted"]
        how = ", measured" if "measured" in facts else ""
        assert f"| activated a token (gate counted{how}) | {used:,} |" in card
        # What was measured is of the end.
        before = open_source(runs / f"{method}-one" / "checkpoints" / "step_00000002", say=print)
        how, used = how and ", planned", facts["parameters"]["activated_gate_counted"]
        card = model_card(before, source.architecture, torch.float32, "")
        assert f"| activated a token (gate counted{how}) | {used:,} |" in card
        found = checks.check_export(source, tmp_path / "hf", dtype=None)
        assert found.holds, found.describe()
        check_decoding(checks.load_for_check(tmp_path / "hf"), source.mone, monkeypatch)


def check_decoding(
    model: PreTrainedModel, mone: MoNEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes a text by whole matrices, and by rows where a rule and a score have them."""
    monkeypatch.setattr(decode_mone, "WORTH_IT", 0.0)
    monkeypatch.setattr(decode_mone, "OVERHEAD_BYTES", 0)
    by_rows = []
    sparse_experts = decode_mone.sparse_experts

    def counted(*arguments: Any) -> Tensor:
        by_rows.append(len(arguments[0]))
        return sparse_experts(*arguments)

    monkeypatch.setattr(decode_mone, "sparse_experts", counted)
    prompt = torch.arange(1, 9).unsqueeze(0)
    asked: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "attention_mask": torch.ones_like(prompt),
    }  # fmt: skip
    model.set_experts_implementation("mone")
    expected = model.generate(prompt, **asked)
    model.set_experts_implementation(decode_mone.MONE_SPARSE)
    reads_rows = RULES[mone.rule].top_k and "down_norm" not in SCORES[mone.score].reads
    reasons = {
        decode_mone.unsupported(cast(ExpertsModule, each)) for each in experts_modules(model)
    }
    if reads_rows and reasons != {None}:
        (reason,) = reasons
        with pytest.raises(
            ValueError, match=rf"mone_sparse: \w+ {re.escape(str(reason))}; use mone"
        ):
            model.generate(prompt, **asked)
        return
    found = model.generate(prompt, **asked)
    assert bool(by_rows) == reads_rows
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_what_is_trained(runs: Path, chosen: dict[str, str], method: str) -> None:
    losses = {name: [record["loss"] for record in records(runs / f"{name}-one")] for name in chosen}
    assert all(losses[method] != losses[other] for other in chosen if other != method)
