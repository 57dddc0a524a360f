"""The live panel in real runs: what it costs the training (no bit), and that alerts find damage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mone_megatron.testing.launch import REPOSITORY, rank_variables, run_layouts
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.warm_start import run_python
from mone_megatron.train.panel import Panel

SCRIPT = Path(__file__).with_name("planted_runs.py")
QUIET = (
    "logging.wandb.mode=disabled",
    "logging.report=false",
    "logging.progress=none",
    "device.threads=1",
)
TINY = (
    *("experiment=tiny_mone", *QUIET, "train.global_batch_size=4", "train.steps=4"),
    *("logging.layer_interval=1", "logging.alerts.patience=2"),
)
# Experts chosen by a score and a bias, which the training moves by 0.05 a step against the load.
BIASED = (
    *("model.router.score_function=sigmoid", "model.router.expert_bias=true"),
    *("model.router.expert_bias_rate=0.05", "train.steps=14"),
)
RAW = ("mone.balance.normalize=false", "mone.balance.coeff=10", "train.steps=18")
UNBALANCED = "mone.balance.coeff=0"
# Every kind of MLP that selects.
EVERYWHERE = (
    *(*TINY, "model.shared_expert_ffn_hidden_size=64", "model.first_dense_layers=1"),
    "mone.apply_to=[routed,shared,dense]",
)
LAYOUTS = {
    "ep2": ("parallel.expert=2",),
    "tp2_etp2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
    "tp2_ep2": ("parallel.tensor=2", "parallel.expert=2"),
    "pp2": ("parallel.pipeline=2",),
    "dp2": (),
}
JOBS: dict[str, dict[str, Any]] = {
    "seen": {"overrides": TINY},
    "unseen": {"overrides": (*TINY, "logging.layer_interval=0")},
    "unbalanced_seen": {"overrides": (*TINY, UNBALANCED)},
    "unbalanced_unseen": {"overrides": (*TINY, UNBALANCED, "logging.layer_interval=0")},
    # Expert 5 of layer 2 is never chosen, until its bias has risen; experts 0 and 1 of layer 4
    # always are.
    "biased": {
        "overrides": (*TINY, *BIASED),
        "bias": {2: {5: -0.6}, 4: {0: 10, 1: 10}},
    },
    # All but the 16 neurons that a token keeps have a gate of zero.
    "dead": {"overrides": TINY, "dead": {3: {1: 48}}},
    "raw": {"overrides": (*TINY, *RAW)},
    "everywhere": {"overrides": EVERYWHERE},
    "silent": {"overrides": (*TINY, "logging.alerts.enabled=false"), "dead": {3: {1: 48}}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of ``JOBS``, one after the other in one process."""
    folder = tmp_path_factory.mktemp("panel")
    jobs = []
    for (name, job), port in zip(JOBS.items(), free_ports(len(JOBS)), strict=True):
        overrides = [*job["overrides"], f"run.dir={folder / name}"]
        said = str(folder / f"{name}.log")
        jobs.append(job | {"overrides": overrides, "port": port, "said": said})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    result = run_python(
        [str(SCRIPT), str(file)], environment=rank_variables(0, 1), folder=REPOSITORY
    )
    logs = sorted(folder.glob("*.log"), key=lambda log: log.stat().st_mtime)
    assert result.returncode == 0, logs[-1].read_text(encoding="utf-8")[-4000:]
    return folder


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _panels(run: Path) -> list[Panel]:
    return [Panel.from_record(record) for record in _lines(run / "panel.jsonl")]


def _places(run: Path, kind: str, event: str = "begin") -> set[tuple[str, int, int]]:
    return {
        (alert["part"], alert["layer"], alert["expert"])
        for alert in _lines(run / "alerts.jsonl")
        if (alert["kind"], alert["event"]) == (kind, event)
    }


@pytest.mark.parametrize("name", ["", "unbalanced_"])
def test_looking_changes_no_bit(runs: Path, name: str) -> None:
    seen = _lines(runs / f"{name}seen" / "metrics.jsonl")
    unseen = _lines(runs / f"{name}unseen" / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert [one[key] for one in seen] == [one[key] for one in unseen]
    assert "mone/load_entropy" in seen[0]
    assert "mone/load_entropy" not in unseen[0]
    assert not (runs / f"{name}unseen" / "panel.jsonl").exists()


def test_a_sound_run_raises_no_alert(runs: Path) -> None:
    assert _lines(runs / "seen" / "alerts.jsonl") == []
    assert "ALERT" not in (runs / "seen.log").read_text(encoding="utf-8")


def test_a_router_that_never_chooses_an_expert(runs: Path) -> None:
    run = runs / "biased"
    dead = {("routed", 4, expert) for expert in range(2, 8)} | {("routed", 2, 5)}
    assert _places(run, "dead_expert") == dead
    assert _places(run, "load_collapse") == {("router", 4, 0)}
    # The bias of expert 5 has risen; those of layer 4 would take 200 steps.
    assert _places(run, "dead_expert", "end") == {("routed", 2, 5)}
    assert _places(run, "load_collapse", "end") == set()


def test_dead_neurons(runs: Path) -> None:
    run = runs / "dead"
    alerts = _lines(run / "alerts.jsonl")
    assert [(one["step"], one["kind"], one["layer"], one["expert"]) for one in alerts] == [
        (2, "dead_neurons", 3, 1),
        (2, "load_collapse", 3, 1),
    ]
    assert alerts[0]["value"] == 0.75
    assert alerts[1]["value"] == pytest.approx(0, abs=1e-3)
    said = (runs / "dead.log").read_text(encoding="utf-8").splitlines()
    told = [line for line in said if line.startswith("ALERT")]
    assert told == [f"ALERT step 2: {alert['message']}" for alert in alerts]


def test_a_balance_loss_that_falls_by_shrinking_weights(runs: Path) -> None:
    found = _places(runs / "raw", "shrinking_weights")
    assert {layer for _, layer, _ in found} >= {3, 4}
    records = _lines(runs / "raw" / "metrics.jsonl")
    activation = [record["mone/kept_activation/layer_4"] for record in records]
    assert activation[-1] < activation[0] / 2


def test_alerts_can_be_off(runs: Path) -> None:
    assert _lines(runs / "silent" / "panel.jsonl")
    assert _lines(runs / "silent" / "alerts.jsonl") == []


def test_the_panel_holds_every_expert(runs: Path) -> None:
    panels = _lines(runs / "seen" / "panel.jsonl")
    records = _lines(runs / "seen" / "metrics.jsonl")
    assert [panel["step"] for panel in panels] == [1, 2, 3, 4]
    for panel, record in zip(panels, records, strict=True):
        assert 0 < record["panel_seconds"] < 60
        for layer in panel["layers"]:
            number = layer["layer"]
            assert sum(layer["tokens"]) == 4 * 64 * 2
            for name, values in layer.items():
                mean = record.get(f"mone/{name}/layer_{number}")
                if isinstance(values, list) and mean is not None:
                    known = [value for value in values if value is not None]
                    assert sum(known) / len(known) == pytest.approx(mean, rel=1e-3), name
            expected = record[f"mone/balance_loss/layer_{number}"]
            assert layer["balance_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def layouts(runs: Path) -> Path:
    """``LAYOUTS`` on two processes."""
    jobs = {name: (*EVERYWHERE, *layout) for name, layout in LAYOUTS.items()}
    run_layouts(jobs, processes=2, folder=runs / "layouts")
    return runs / "layouts"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_sees_the_same(runs: Path, layouts: Path, name: str) -> None:
    """Where two scores are equal but for rounding, a layout may choose another neuron: of all the
    tokens of an expert that is one (tests/integration/test_layouts_agree.py)."""
    expected, actual = (_panels(run) for run in (runs / "everywhere", layouts / name))
    kinds = {(use.mlp, use.layer) for use in expected[0].layers}
    assert kinds == {("dense", 1), *((mlp, n) for mlp in ("routed", "shared") for n in (2, 3, 4))}
    assert [panel.step for panel in expected] == [panel.step for panel in actual] == [1, 2, 3, 4]
    for one, other in zip(expected, actual, strict=True):
        for use, again in zip(one.layers, other.layers, strict=True):
            assert (use.mlp, use.layer) == (again.mlp, again.layer)
            assert again.balance_loss == pytest.approx(use.balance_loss, rel=1e-3)
            assert again.experts.keys() == use.experts.keys()
            assert again.experts["tokens"] == pytest.approx(use.experts["tokens"], abs=2)
            for key, row in use.experts.items():
                if key != "tokens":
                    least = 0.02 if key == "dead_neuron_share" else 1e-3
                    close = pytest.approx(row, rel=0.05, abs=least, nan_ok=True)
                    assert again.experts[key] == close, (use.mlp, use.layer, key)
    metrics = [_lines(run / "metrics.jsonl")[3] for run in (runs / "everywhere", layouts / name)]
    # Which neurons chunks of tokens keep is known where a rank has all of a layer's.
    whole, other = ({key for key in one if "chunk_union" not in key} for one in metrics)
    assert whole == other
    unions = [{key for key in one if "chunk_union" in key} for one in metrics]
    assert "mone/chunk_union_32/layer_2" in unions[0]
    assert "mone/dense/chunk_union_8/layer_1" in unions[0]
    assert unions[1] <= unions[0]
    if name in ("pp2", "dp2"):
        assert unions[1] == unions[0]
    if name in ("ep2", "tp2_ep2"):
        assert "mone/chunk_union_32/layer_2" not in unions[1]
    for key in unions[1]:
        assert metrics[1][key] == pytest.approx(metrics[0][key], rel=0.02), key
    # Of one token it is what it keeps: of the layer's experts, those that it goes to.
    tokens = {(use.mlp, use.layer): use.experts["tokens"] for use in expected[3].layers}
    chosen = sum(tokens["routed", 2]) / tokens["dense", 1][0]
    assert metrics[0]["mone/chunk_union_1/layer_2"] == pytest.approx(
        metrics[0]["mone/density/layer_2"] * chosen / len(tokens["routed", 2])
    )
    assert "mone/shared/load_overlap/layer_4" in metrics[0]


def test_every_recorded_number_is_documented(runs: Path) -> None:
    guide = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set()
    for row in re.findall(r"^\| (`.+?) \|", guide, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", row)
        stem = names[0].rsplit("_", 1)[0]
        documented |= {stem + name if name.startswith("_") else name for name in names}
    recorded = {
        key.split("/layer_")[0]
        for record in _lines(runs / "seen" / "metrics.jsonl")
        for key in record
    }
    assert recorded <= documented, sorted(recorded - documented)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["quickstart_moe", "quickstart_mone"])
def test_no_false_alarm_on_the_quickstart(tmp_path: Path, experiment: str) -> None:
    """At the default interval and thresholds."""
    overrides = ("parallel.expert=1", "train.steps=60", "optim.warmup_steps=10")
    jobs = {experiment: (f"experiment={experiment}", *QUIET, *overrides)}
    run_layouts(jobs, processes=1, folder=tmp_path)
    assert len(_lines(tmp_path / experiment / "panel.jsonl")) == 6
    assert _lines(tmp_path / experiment / "alerts.jsonl") == []
