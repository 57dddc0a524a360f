"""Points from run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mone_megatron.config.load import compose
from mone_megatron.lab.scaling_law.run_table import read_runs
from mone_megatron.planning import count_parameters

RunBuilder = Callable[..., Path]


def edit(run: Path, **values: Any) -> Path:
    summary = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(summary | values), encoding="utf-8")
    return run


def test_figures_of_a_run(make_run: RunBuilder) -> None:
    runs = [make_run("a", steps=20), make_run("b", steps=40, mone=False)]
    table = read_runs(runs)
    assert table.params_R.tolist() == [5_000_000, 7_000_000]
    assert table.tokens_R.tolist() == [20 * 512, 40 * 512]
    assert table.flops_R.tolist() == [20 * 1.5e10, 40 * 1.5e10]
    assert table.ratio_R is not None
    assert table.ratio_R.tolist() == [0.25, 1.0]
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    assert table.loss_R.tolist() == [record["val_loss"] for record in last]
    assert table.mismatches == ()
    assert table.names == tuple(map(str, runs))

    other = read_runs(runs, params_of="neurons_only", loss_of="train", flops_of="realised")
    assert other.params_R.tolist() == [4_000_000, 7_000_000]
    # The mean of the last step, and of the last two: 5% rounded up.
    assert other.loss_R[0] == last[0]["loss"]
    assert other.flops_R[0] == 20 * 2e10
    assert read_runs(runs, params_of="total").params_R.tolist() == [12_345_678] * 2


@pytest.mark.parametrize("apply_to", [["routed"], ["routed", "shared", "dense"]])
def test_all_neurons_counts_the_same_model_without_selection(
    make_run: RunBuilder, apply_to: list[str]
) -> None:
    config = compose(["experiment=flame_38m_mone", "mone.keep_ratio=0.3"])
    selected = replace(config.mone, apply_to=apply_to)
    counted = count_parameters(config.model, selected, 50304)
    plain = count_parameters(config.model, replace(selected, enabled=False), 50304)
    # As an earlier version recorded it.
    earlier = {key: n for key, n in counted.recorded.items() if key != "activated_all_neurons"}
    run = edit(make_run("a"), parameters=earlier)
    assert counted.activated_gate_counted < plain.activated_gate_counted
    by_up = count_parameters(config.model, replace(selected, score="wina"), 50304)
    wina = edit(make_run("b"), parameters=by_up.recorded)
    assert read_runs([wina], params_of="all_neurons").params_R.tolist() == [
        plain.activated_gate_counted
    ]
    assert read_runs([run], params_of="all_neurons").params_R.tolist() == [
        plain.activated_gate_counted
    ]


def test_runs_that_are_not_comparable_are_told(make_run: RunBuilder) -> None:
    runs = [
        make_run("a", steps=10),
        make_run("b", steps=12, fingerprint="sha256:other"),
        make_run("c", steps=14, seq_length=32, status="interrupted"),
    ]
    assert read_runs(runs).mismatches == (
        f"data_fingerprint: sha256:abc in {runs[0]}, sha256:other in {runs[1]}",
        f"train.seq_length: 64 in {runs[0]}, 32 in {runs[2]}",
        f"status: {runs[2]} is interrupted, not completed",
    )
    unknown = [
        edit(make_run(name, steps=n), data_fingerprint=None) for name, n in (("d", 3), ("e", 4))
    ]
    assert "data_fingerprint: not recorded" in read_runs(unknown).mismatches[0]


def test_what_a_run_lacks_is_named(make_run: RunBuilder) -> None:
    with pytest.raises(ValueError, match="was never validated: give --run-loss train"):
        read_runs([make_run("a", eval_interval=0)])
    with pytest.raises(ValueError, match=r"no 'parameters.activated_gate_counted'"):
        read_runs([edit(make_run("b"), parameters={})])
    with pytest.raises(ValueError, match=r"no 'flops_per_step.ideal'"):
        read_runs([edit(make_run("c"), flops_per_step={})])
    with pytest.raises(ValueError, match=r"'loss' is not a finite positive number in .*d \(nan\)"):
        read_runs([make_run("d", loss=lambda step: float("nan"))])


def test_a_run_counts_once_and_seeds_are_replicates(make_run: RunBuilder) -> None:
    runs = [make_run("a", seed=1), make_run("b", seed=2), make_run("c", seed=2)]
    with pytest.raises(ValueError, match="a is given twice"):
        read_runs([runs[0], runs[0]])
    assert len(read_runs(runs[:2])) == 2
    with pytest.raises(ValueError, match=r"b and .*c have the same .* are the same run"):
        read_runs(runs)
    assert len(read_runs(runs, allow_duplicates=True)) == 3
