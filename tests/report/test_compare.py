from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mone_megatron.lab.scaling_law.run_table import read_runs
from mone_megatron.report.compare import compare, compared_curves
from mone_megatron.report.comparison_files import text_report, write_comparison
from mone_megatron.report.plots import comparison_figure, parameter_line
from mone_megatron.report.run_page import write_report
from mone_megatron.report.runs import load_run
from mone_megatron.testing.launch import import_path

RunBuilder = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]


def cells(report: str, name: str) -> list[str]:
    """The row of a run in the text table."""
    row = next(line for line in report.splitlines() if line.startswith(f"{name} "))
    return row.split()


def test_table_hand_checked(make_run: RunBuilder) -> None:
    moe = load_run(make_run("moe", name="moe", loss=lambda s: 5.0 - s / 100, mone=False))
    mone = load_run(make_run("mone", name="mone", loss=lambda s: 4.9 - s / 100, step_seconds=0.54))
    comparison = compare([moe, mone])
    assert comparison.comparable
    report = text_report(comparison)
    assert report.startswith("Comparable")
    # 5% of 40 steps: 39 and 40, so 5 - 0.395; validation is the loss of step 40 plus 0.5.
    assert cells(report, "moe") == [
        "moe", "4.6050", "-", "5.1000", "20.5K", "1.02K", "1.000x", "12.3M", "7.00M", "7.00M",
        "completed",
    ]  # fmt: skip
    assert cells(report, "mone") == [
        "mone", "4.5050", "-0.1000", "5.0000", "20.5K", "948", "1.080x", "12.3M", "5.00M", "4.00M",
        "completed",
    ]  # fmt: skip
    assert "mone.enabled: false | true" in report
    assert "run.dir" not in report
    header = report.splitlines()[2]
    assert "activated (gate counted)" in header
    assert "activated (neurons only)" in header


def test_measured_counts_take_the_place_of_planned_ones(make_run: RunBuilder) -> None:
    planned, measured = make_run("planned", name="planned"), make_run("measured", name="measured")
    facts = json.loads((measured / "run.json").read_text())
    facts["measured"] = {
        "parameters": {"activated_gate_counted": 6_100_000, "activated_neurons_only": 5_100_000},
        "flops_per_step": {"ideal": 1.7e10},
        "experts_per_token": 1.9,
    }
    (measured / "run.json").write_text(json.dumps(facts))
    runs = [load_run(planned), load_run(measured)]
    report = text_report(compare(runs))
    assert cells(report, "planned")[7:10] == ["12.3M", "5.00M", "4.00M"]
    row = cells(report, "measured")
    assert row[7:12] == ["12.3M", "6.10M", "measured", "5.10M", "measured"]
    assert runs[1].flops_per_step == {"ideal": 1.7e10, "realised": 2e10}
    assert "6.10M activated (gate counted, measured)" in parameter_line(runs[1])
    assert "5.00M activated (gate counted)" in parameter_line(runs[0])
    page = write_report(measured).read_text(encoding="utf-8")
    assert "49% of total, measured over the last quarter" in page
    assert ", measured" not in write_report(planned).read_text(encoding="utf-8")
    table = read_runs([planned, measured], loss_of="train", params_of="activated")
    assert table.params_R.tolist() == [5_000_000, 6_100_000]
    assert table.flops_R.tolist() == [40 * 1.5e10, 40 * 1.7e10]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fingerprint": "sha256:other"}, ["data_fingerprint: sha256:abc in a, sha256:other in b"]),
        ({"seed": 7}, ["seed: 1234 in a, 7 in b"]),
        (
            {"seq_length": 32, "global_batch_size": 16},
            ["train.seq_length: 64 in a, 32 in b", "train.global_batch_size: 8 in a, 16 in b"],
        ),
        (
            {"global_batch_size": 4},
            [
                "train.global_batch_size: 8 in a, 4 in b",
                "tokens per step: 512 in a, 256 in b",
                "tokens: 20480 in a, 10240 in b",
            ],
        ),
        ({"steps": 30, "status": "interrupted"}, ["tokens: 20480 in a, 15360 in b"]),
        ({"config": {"optim": {"lr": 1.0}}}, []),
    ],
)
def test_mismatches_name_the_key_and_both_values(
    make_run: RunBuilder, options: dict[str, object], expected: list[str]
) -> None:
    comparison = compare(
        [load_run(make_run("a", name="a")), load_run(make_run("b", name="b", **options))]
    )
    assert [str(mismatch) for mismatch in comparison.mismatches] == expected
    assert comparison.comparable == (not expected)
    report = text_report(comparison)
    assert report.startswith("NOT COMPARABLE\n") == bool(expected)
    for sentence in expected:
        assert f"  {sentence}\n" in report
    assert cells(report, "a")
    assert cells(report, "b")


def test_what_was_not_recorded_is_not_called_equal(make_run: RunBuilder) -> None:
    runs = []
    for name in ("a", "b"):
        directory = make_run(name, name=name)
        summary = json.loads((directory / "run.json").read_text())
        summary["data_fingerprint"] = None
        (directory / "run.json").write_text(json.dumps(summary))
        runs.append(load_run(directory))
    assert [str(mismatch) for mismatch in compare(runs).mismatches] == [
        "data_fingerprint: not recorded in a, not recorded in b"
    ]


def test_runs_of_different_length_compare_on_common_steps(make_run: RunBuilder) -> None:
    long = load_run(make_run("a", name="a", steps=40, loss=lambda s: 10.0 - s / 10))
    short = load_run(make_run("b", name="b", steps=20, loss=lambda s: 10.5 - s / 10))
    comparison = compare([long, short])
    assert comparison.figures[1].loss_difference == pytest.approx(0.5)
    reference, other = compared_curves(comparison)
    assert reference.difference is None
    assert other.difference is not None
    assert other.difference.steps.tolist() == list(range(1, 21))
    np.testing.assert_allclose(other.difference.values, 0.5)
    # The other way round too: a run that goes on after the reference ended.
    assert compare([short, long]).figures[1].loss_difference == pytest.approx(-0.5)


def seeds(make_run: RunBuilder, name: str, base: float, numbers: list[int]) -> list[Path]:
    return [
        make_run(
            f"{name}_s{seed}",
            name=f"{name}_s{seed}",
            seed=seed,
            mone=name == "mone",
            loss=lambda step, seed=seed: base + seed / 10,
        )
        for seed in numbers
    ]


def test_groups_over_seeds_hand_checked(make_run: RunBuilder) -> None:
    paths = seeds(make_run, "moe", 3.0, [1, 2, 3]) + seeds(make_run, "mone", 2.9, [3, 1, 2])
    runs = [load_run(path) for path in paths]
    comparison = compare(runs, group_seeds=True)
    assert comparison.comparable
    moe, mone = comparison.groups
    assert (moe.label, mone.label) == ("moe", "mone")
    assert mone.seeds == (3, 1, 2)
    # Losses 3.1, 3.2, 3.3: mean 3.2, standard deviation 0.1, half-width 4.3027 * 0.1 / sqrt(3).
    assert moe.train_loss.mean == pytest.approx(3.2)
    assert moe.train_loss.half_width == pytest.approx(0.24842, abs=1e-5)
    assert mone.loss_difference is not None
    assert mone.loss_difference.mean == pytest.approx(-0.1)
    assert mone.loss_difference.half_width == pytest.approx(0, abs=1e-9), "paired by seed"
    report = text_report(comparison)
    assert "3.2000 ± 0.2484" in report
    assert "-0.1000 ± 0.0000" in report
    curves = compared_curves(comparison)
    assert [curve.label for curve in curves] == ["moe (3 seeds)", "mone (3 seeds)"]
    assert curves[0].low is not None
    assert curves[0].high is not None
    np.testing.assert_allclose(curves[0].low, 3.1)
    np.testing.assert_allclose(curves[0].high, 3.3)
    # Without grouping the same runs differ in their seeds.
    assert [mismatch.key for mismatch in compare(runs).mismatches] == ["seed"] * 4


def test_groups_must_hold_the_same_seeds_once(make_run: RunBuilder) -> None:
    paths = seeds(make_run, "moe", 3.0, [1, 2]) + seeds(make_run, "mone", 2.9, [1, 3])
    comparison = compare([load_run(path) for path in paths], group_seeds=True)
    assert [str(mismatch) for mismatch in comparison.mismatches] == [
        "seeds: 1, 2 in moe, 1, 3 in mone"
    ]
    assert comparison.groups[1].loss_difference is None
    twice = compare([load_run(paths[0]), load_run(paths[0])], group_seeds=True)
    assert [str(mismatch) for mismatch in twice.mismatches] == ["repeated seeds: 1 in moe_s1"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [([0.5, 0.7], "0.600 (0.500 to 0.700)"), ([0.5, 0.5], "0.500"), ([0.25], "0.250")],
)
def test_speeds_of_a_group_are_a_range_of_the_machine(
    make_run: RunBuilder, seconds: list[float], shown: str
) -> None:
    """Student's t over two of them was wider than the speed itself."""
    runs = [
        load_run(make_run(f"s{seed}", name=f"moe_s{seed}", seed=seed, step_seconds=each))
        for seed, each in enumerate(seconds)
    ]
    report = text_report(compare(runs, group_seeds=True))
    row = next(line for line in reversed(report.splitlines()) if line.startswith("moe"))
    assert row.split("  ")[-1].strip() == shown


def test_bands_over_seeds_are_inside_the_picture(make_run: RunBuilder) -> None:
    # One seed far above the mean from the first step on, another far below at the end.
    losses = [lambda s: 9.0 - s / 100, lambda s: 5.0 - s / 100, lambda s: 1.0 - s / 100]
    runs = [
        load_run(make_run(f"s{seed}", name=f"moe_s{seed}", seed=seed, loss=loss))
        for seed, loss in enumerate(losses)
    ]
    comparison = compare(runs, group_seeds=True)
    (curve,) = compared_curves(comparison)
    assert curve.low is not None
    assert curve.high is not None
    bottom, top = comparison_figure([curve], "a", "").axes[0].get_ylim()
    assert bottom < curve.low.min()
    assert curve.high.max() < top


def test_group_of_one_has_no_interval(make_run: RunBuilder) -> None:
    comparison = compare([load_run(make_run("a", name="a_s10"))], group_seeds=True)
    assert comparison.groups[0].label == "a_s10"
    assert math.isnan(comparison.groups[0].train_loss.half_width)
    assert "±" not in text_report(comparison).splitlines()[-2]


@pytest.mark.parametrize(
    ("labels", "group"),
    [
        (["moe_s10", "moe_s11"], "moe"),
        (["moe-seed=1", "moe-seed=2"], "moe"),
        (["run1", "run2"], "run"),
        (["a", "b"], "a"),
        (["mone_e8_s1", "mone_e8_s2"], "mone_e8"),
        (["top-k (seed_1)", "top-k (seed_2)"], "top-k"),
        (["top-k (seed=10)", "top-k (seed=11)"], "top-k"),
        (["mone#s1", "mone#s2"], "mone"),
    ],
)
def test_group_labels(make_run: RunBuilder, labels: list[str], group: str) -> None:
    runs = [load_run(make_run(f"r{seed}", name="x", seed=seed)) for seed in (1, 2)]
    assert compare(runs, labels, group_seeds=True).groups[0].label == group


def test_labels(make_run: RunBuilder) -> None:
    first, second = make_run("a", name="same"), make_run("b", name="same")
    runs = [load_run(first), load_run(second), load_run(second)]
    labels = [figure.label for figure in compare(runs).figures]
    assert labels[0] == "same (a)"
    assert len(set(labels)) == 3
    assert [f.label for f in compare(runs, ["x", "y", "z"]).figures] == ["x", "y", "z"]
    with pytest.raises(ValueError, match="2 labels for 3 runs"):
        compare(runs, ["x", "y"])
    with pytest.raises(ValueError, match="repeats a label"):
        compare(runs, ["x", "y", "x"])
    with pytest.raises(ValueError, match="no runs"):
        compare([])


def test_diverged_run_is_shown_not_hidden(make_run: RunBuilder, tmp_path: Path) -> None:
    runs = [
        load_run(make_run("a", name="a")),
        load_run(make_run("b", name="b", loss=lambda _: math.nan)),
    ]
    comparison = compare(runs)
    assert cells(text_report(comparison), "b")[1:4] == ["nan", "nan", "nan"]
    _, page, data = write_comparison(comparison, tmp_path / "out")
    assert json.loads(data.read_text())["runs"][1]["final_train_loss"] is None
    assert "nan" in page.read_text()


def test_outputs(make_run: RunBuilder, tmp_path: Path) -> None:
    runs = [
        load_run(make_run("a", name="<b>a</b>")),
        load_run(make_run("b", name="b", seed=3, step_seconds=1.0)),
    ]
    picture, page, data = write_comparison(compare(runs), tmp_path / "new" / "out")
    assert matplotlib.image.imread(picture).shape[:2] == (700, 1200)
    text = page.read_text()
    assert "<b>a" not in text
    assert "NOT COMPARABLE" in text
    assert "seed: 1234 in &lt;b&gt;a&lt;/b&gt;, 3 in b" in text
    document = json.loads(data.read_text())
    assert document["comparable"] is False
    assert document["mismatches"] == [
        {
            "key": "seed",
            "reference": "<b>a</b>",
            "reference_value": 1234,
            "run": "b",
            "value": 3,
        }
    ]
    assert document["runs"][1]["step_time_ratio_to_first"] == 2
    assert document["config_differences"] == {"train.seed": [1234, 3]}


def test_many_runs_fit_the_picture(make_run: RunBuilder, tmp_path: Path) -> None:
    path = make_run("a", steps=12)
    runs = [load_run(path)] * 40
    picture, _, _ = write_comparison(compare(runs), tmp_path / "out")
    assert matplotlib.image.imread(picture).shape[:2] == (700, 1200)


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "compare_runs.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": import_path(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tool_end_to_end(make_run: RunBuilder, tmp_path: Path) -> None:
    a, b = make_run("a", name="a", steps=12), make_run("b", name="b", steps=12)
    out = tmp_path / "out"
    done = tool(a, b, "--output", out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.html",
        "comparison.json",
        "comparison.png",
    ]
    c = make_run("c", name="c", steps=10, status="interrupted")
    refused = tool(a, c, "--output", out, "--labels", "first", "other")
    assert refused.returncode == 1
    assert "tokens: 6144 in first, 5120 in other" in refused.stdout
    assert refused.stdout.index("NOT COMPARABLE") < refused.stdout.index("train loss")
    allowed = tool(a, c, "--output", out, "--allow-mismatch")
    assert allowed.returncode == 0
    assert "NOT COMPARABLE" in allowed.stdout


def test_tool_names_bad_input_in_one_line(make_run: RunBuilder, tmp_path: Path) -> None:
    empty = make_run("a")
    (empty / "metrics.jsonl").write_text("")
    for arguments, words in (
        ((tmp_path / "absent",), "absent is not a folder"),
        ((empty,), "metrics.jsonl holds no step"),
        ((empty, "--page", ""), "--page: is empty"),
    ):
        done = tool(*arguments, "--output", tmp_path / "out")
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
