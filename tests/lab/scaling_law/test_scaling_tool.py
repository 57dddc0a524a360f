"""tools/scaling_law.py: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
from scaling_tables import FLAME, build_table

from mone_megatron.lab.scaling_law.law import Law
from mone_megatron.lab.scaling_law.table import Table
from mone_megatron.testing.launch import import_path
from mone_megatron.testing.tools import Main, load_tool

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "scaling_law.py"
QUICK = ("--starts", "30", "--bootstrap", "20", "--folds", "3", "--quiet")
# The fit alone.
BARE = ("--starts", "20", "--bootstrap", "0", "--folds", "0", "--holdout", "0", "--quiet")


@pytest.fixture(scope="module")
def main() -> Main:
    return load_tool("scaling_law")


def write(path: Path, table: Table) -> Path:
    columns = {"params": table.params_R, "tokens": table.tokens_R, "loss": table.loss_R}
    if table.ratio_R is not None:
        columns["keep_ratio"] = table.ratio_R
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Printed text, folder and table of one run of the command, in a process of its own."""
    folder = tmp_path_factory.mktemp("fit")
    table = write(folder / "table.csv", build_table(noise=1e-3))
    done = subprocess.run(
        [
            *(sys.executable, str(TOOL), str(table), "--output", str(folder / "out"), *QUICK[:-1]),
            *("--methods", "parametric", "isoflop", "--budget", "1e21", "--predict", "1.7B,100B"),
        ],
        env={**os.environ, "PYTHONPATH": import_path(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "30/30" in done.stderr  # the progress line
    return done.stdout, folder / "out", table


def test_json_holds_what_was_fitted(results: tuple[str, Path, Path]) -> None:
    found = json.loads((results[1] / "scaling_law.json").read_text())
    for name, truth in FLAME.coefficients.items():
        one = found["parametric"]["coefficients"][name]
        assert one["low"] <= one["value"] <= one["high"]
        assert one["value"] == pytest.approx(truth, rel=0.2)
    assert found["parametric"]["exponents"]["a"]["value"] == pytest.approx(0.719, abs=0.01)
    assert found["parametric"]["relative_errors"]["held_out_budgets"]["mean_absolute"] < 0.01
    assert found["parametric"]["relative_errors"]["held_out_folds"]["runs"] == 24
    truth = FLAME.optimum(1e21, 6)
    by_method = {one["method"]: one for one in found["allocations"]}
    assert by_method["parametric"]["params"]["value"] == pytest.approx(truth.params, rel=0.1)
    assert by_method["parametric"]["loss"]["value"] == pytest.approx(truth.loss, rel=0.01)
    assert by_method["isoflop"]["loss"] is None
    assert by_method["isoflop"]["reach"] == pytest.approx(10)
    assert found["parametric"]["predictions"][0]["loss"]["value"] == pytest.approx(
        float(FLAME.loss(1.7e9, 1e11)),  # type: ignore[arg-type]
        rel=0.01,
    )


def test_text_says_the_same(results: tuple[str, Path, Path]) -> None:
    text = results[0]
    for words in (
        "24 runs of 24 points",
        "6 N D",
        "L(N, D) = E + A/N^alpha + B/D^beta",
        "largest budget held out",
        "3 folds",
        "extrapolated: 10 x the largest FLOPs",
        "IsoFLOP parabolas",
    ):
        assert words in text


def test_files(results: tuple[str, Path, Path], main: Main, tmp_path: Path) -> None:
    _, out, _ = results
    assert sorted(path.name for path in out.iterdir()) == [
        *("allocation.csv", "allocation.png", "coefficients.csv", "fit.png", "isoflop.csv"),
        *("isoflop.png", "points.csv", "predictions.csv", "scaling_law.json"),
    ]
    for picture in out.glob("*.png"):
        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[:2] == (700, 1200)
        assert pixels.std() > 0.02
    with open(out / "points.csv", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert len(points) == 24
    assert all(float(row["fitted"]) > 0 and float(row["held_out_folds"]) > 0 for row in points)
    assert sum(row["held_out"] != "" for row in points) == 6
    # A table of points is a table: the same numbers come out.
    arguments = [str(out / "points.csv"), "--output", str(tmp_path), *BARE, "--starts", "30"]
    assert main(arguments) == 0
    first, again = (
        json.loads((folder / "scaling_law.json").read_text())["parametric"]["coefficients"]
        for folder in (out, tmp_path)
    )
    assert {name: one["value"] for name, one in first.items()} == {
        name: one["value"] for name, one in again.items()
    }


def test_neuron_term_from_run_folders(
    main: Main, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28, gamma=0.3)
    table = build_table(law, sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19, 1e20), ratios=(0.25, 1.0))
    runs = []
    for index in range(len(table)):
        assert table.ratio_R is not None
        ratio, params = float(table.ratio_R[index]), round(table.params_R[index])
        loss = float(table.loss_R[index])
        run = make_run(
            f"run{index}", steps=1, mone=ratio < 1, loss=lambda step, loss=loss: loss - 0.5
        )
        summary = json.loads((run / "run.json").read_text())
        # Half of the parameters are experts: with the gate (1 + 2r)/3 of them count, without r.
        summary["parameters"] = {
            "total": 8 * params,
            "activated_gate_counted": round(params * (0.5 + 0.5 * (1 + 2 * ratio) / 3)),
            "activated_neurons_only": round(params * (0.5 + 0.5 * ratio)),
        }
        # Kept neurons alone are computed.
        cost = 4 if ratio < 1 else 6
        summary["flops_per_step"] = {"ideal": cost * params * float(table.tokens_R[index])}
        (run / "run.json").write_text(json.dumps(summary))
        record = json.loads((run / "metrics.jsonl").read_text())
        record["tokens"] = round(table.tokens_R[index])
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        runs.append(str(run))
    output = ["--output", str(tmp_path / "out"), *BARE]
    request = ["--predict", "1B,10B,0.5", "--budget", "1e21", "--keep-ratio", "0.25"]
    assert main([*runs, *output, "--neuron-term", *request]) == 0
    found = json.loads((tmp_path / "out" / "scaling_law.json").read_text())["parametric"]
    for name, truth in law.coefficients.items():
        assert found["coefficients"][name]["value"] == pytest.approx(truth, rel=1e-3), name
    assert found["predictions"][0]["loss"]["value"] == pytest.approx(
        1.69 + 406.4 / (1e9 * 0.5**0.3) ** 0.34 + 410.7 / 1e10**0.28, rel=1e-4
    )
    assert found["flops_per_param_token"] == pytest.approx(4, rel=1e-6)
    capsys.readouterr()

    assert main([*runs, *output]) == 2
    error = capsys.readouterr().err
    assert "keep ratios: 0.25, 1 (fit them with --neuron-term" in error
    assert main([*runs, *output, "--only-keep-ratio", "1"]) == 0
    assert "9 runs of 9 points" in capsys.readouterr().out


def test_not_comparable_unless_allowed(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "table.csv", build_table(noise=1e-3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",data", *(f"{x},dclm" for x in lines[1:-1])]))
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{lines[-1]},pile\n")
    arguments = [str(path), "--output", str(tmp_path / "out"), *BARE]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "not comparable: data: 'dclm' in line 2, 'pile' in line 25; --allow-mismatch" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--allow-mismatch"]) == 0
    assert "warning: NOT COMPARABLE, data" in capsys.readouterr().out


def test_what_cannot_be_measured_is_said(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = build_table(sizes=(1e8, 3e8, 1e9), budgets=(1e18, 1e19), noise=1e-3)
    path = write(tmp_path / "table.csv", table)
    assert main([str(path), "--output", str(tmp_path / "out"), *QUICK, "--starts", "1"]) == 2
    assert "--bootstrap-kind normal" in capsys.readouterr().err
    normal = ("--starts", "1", "--bootstrap-kind", "normal")
    assert main([str(path), "--output", str(tmp_path / "out"), *QUICK, *normal]) == 0
    text = capsys.readouterr().out
    assert "warning: 1 of 1 starts ended at the best optimum" in text
    assert "not available: " in text
    assert "too few for 5 coefficients" in text


def test_a_law_without_optimum_allocates_nothing_and_says_why(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Larger models are worse here, as when they were trained with a bad learning rate."""
    table = build_table(Law(E=1.7, A=0.01, alpha=-0.2, B=400.0, beta=0.3))
    path = write(tmp_path / "table.csv", table)
    arguments = [str(path), "--output", str(tmp_path / "out"), *BARE, "--starts", "60"]
    assert main([*arguments, "--budget", "1e20"]) == 0
    text = capsys.readouterr().out
    assert "warning: alpha is -0.2 and beta 0.3: the table does not show" in text
    assert "compute-optimal allocation" not in text
    found = json.loads((tmp_path / "out" / "scaling_law.json").read_text())
    assert found["allocations"] == []
    assert found["parametric"]["exponents"] is None
    assert not (tmp_path / "out" / "allocation.png").exists()


def test_flops_that_are_not_proportional_to_size_are_told(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = build_table()
    path = write(tmp_path / "table.csv", table)
    lines = path.read_text().splitlines()
    # Attention costs the small models more than 6 N D.
    costs = (6 + 2 * (table.params_R < 1e8)) * table.params_R * table.tokens_R
    rows = [f"{x},{c!r}" for x, c in zip(lines[1:], costs.tolist(), strict=True)]
    path.write_text("\n".join([lines[0] + ",flops", *rows]) + "\n")
    arguments = [str(path), "--output", str(tmp_path / "out"), *BARE, "--budget", "1e20"]
    assert main(arguments) == 0
    assert "FLOPs are 6 to 8 N D; the parametric fit allocates" in capsys.readouterr().out
    assert main([*arguments, "--flops-per-param-token", "8"]) == 0
    assert "FLOPs are" not in capsys.readouterr().out
    with open(tmp_path / "out" / "allocation.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert 8 * float(row["params"]) * float(row["tokens"]) == pytest.approx(1e20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bootstrap", "5"], "--bootstrap is 5: give 0 (no intervals) or at least 20"),
        (["--confidence", "95"], "--confidence is 95: give a share such as 0.95"),
        (["--starts", "9999"], "starts is 9999: give 1 to 4500"),
        (["--delta", "0"], "delta is 0: give a positive number"),
        (["--neuron-term"], "has no keep ratios"),
        (["--keep-ratio", "0.5"], "--keep-ratio has no effect without --neuron-term"),
        (["--predict", "1B,1B,0.5"], "--predict with a keep ratio needs --neuron-term"),
        (["--methods", "isoflop", "--predict", "1B,1B"], "--predict is about the parametric fit"),
        (["--run-loss", "train"], "--run-loss is about folders of runs"),
        (["--budget", "1e20", "--flops-per-param-token", "0"], "--flops-per-param-token is 0"),
        (["--only-keep-ratio", "0.5"], "has no keep ratios"),
        (["--seed", "-1"], "--seed is -1: give 0 or more"),
        (["--parabola-width", "4"], "--parabola-width is about parabolas: add isoflop"),
        (["--allow-outside"], "--allow-outside is about parabolas: add isoflop"),
        (["--loss-column", "val"], "no column 'val', only 'params', 'tokens', 'loss'"),
    ],
)
def test_refusals_in_one_line(
    main: Main,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    path = write(tmp_path / "table.csv", build_table())
    assert main([str(path), "--output", str(tmp_path / "out"), *BARE, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_folder_is_looked_at_first_and_an_earlier_fit_is_replaced(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "table.csv", build_table())
    fit = [str(path), *BARE, "--starts", "30", "--output"]
    for folder, message in (
        (Path("/proc/nowhere"), "--output: nothing can be written in /proc"),
        (tmp_path, f"--output: {tmp_path} holds files and no scaling_law.json"),
        (path, f"--output: {path} holds files"),
    ):
        assert main([*fit, str(folder)]) == 2
        told = capsys.readouterr()
        assert message in told.err
        assert told.err.count("\n") == 1
        assert not told.out
    out = tmp_path / "out"
    assert main([*fit, str(out), "--predict", "1B,1B", "--budget", "1e20"]) == 0
    assert (out / "predictions.csv").is_file()
    assert main([*fit, str(out)]) == 0
    # Predictions of one law beside the coefficients of another would be read as one.
    assert not (out / "predictions.csv").exists()
    assert not (out / "allocation.csv").exists()
    assert (out / "coefficients.csv").is_file()


def test_inputs_are_one_table_or_runs(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "table.csv", build_table())
    output = ["--output", str(tmp_path / "out")]
    for inputs, message in (
        ([str(path), str(tmp_path)], "give one CSV table or folders of runs, not both"),
        ([str(path), str(path)], "2 CSV tables: put their rows into one"),
        ([str(tmp_path), "--flops-column", "C"], "--flops-column is about CSV tables"),
        ([str(tmp_path)], "config.yaml does not exist"),
    ):
        assert main([*inputs, *output]) == 2
        assert message in capsys.readouterr().err
    for bad in ("1B", "1B,2B,3B", "x,1B", "-1,1B"):
        with pytest.raises(SystemExit) as stopped:
            main([str(path), *output, f"--predict={bad}"])
        assert stopped.value.code == 2
