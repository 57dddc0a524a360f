from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.report.runs import Series, load_run

RunBuilder = Callable[..., Path]


def rewrite(run_dir: Path, lines: list[str]) -> None:
    (run_dir / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_reads_what_a_run_wrote(make_run: RunBuilder) -> None:
    run = load_run(make_run("a", name="tiny_mone", steps=40, layers=3))
    assert run.name == "tiny_mone"
    assert run.last_step == 40
    assert run.tokens == 40 * 64 * 8
    assert run.seed == 1234
    assert run.setting("train.seq_length") == 64
    assert run.setting("train.no_such") is None
    assert run.summary.parameters["total"] == 12_345_678
    assert run.series("val_loss").steps.tolist() == [10, 20, 30, 40]
    assert run.median("step_seconds") == 0.5
    assert run.broken_lines == 0
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no 'nothing'"):
        run.series("nothing")


def test_final_losses_are_the_documented_ones(make_run: RunBuilder) -> None:
    run = load_run(make_run("a", steps=41, loss=float))
    # 5% of 41 steps, rounded up: the last three.
    assert run.final_train_loss == pytest.approx((39 + 40 + 41) / 3)
    assert run.final_validation_loss == 41.5
    never = load_run(make_run("b", steps=3, loss=float, eval_interval=0))
    assert never.final_train_loss == 3
    assert never.final_validation_loss is None


def test_half_written_last_line_is_passed_over(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=10)
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 11, "loss": 2.')
    run = load_run(directory)
    assert run.last_step == 10
    assert run.broken_lines == 1


def test_record_appended_to_a_half_written_line_is_kept(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=1)
    rewrite(
        directory,
        [
            '{"step": 1, "loss": 5.0}',
            '{"step": 2, "lo{"step": 2, "loss": 4.0}',
            '{"step": 3, "loss": 3.0}',
        ],
    )
    run = load_run(directory)
    assert run.series("loss").values.tolist() == [5, 4, 3]
    assert run.broken_lines == 1


def test_last_record_of_a_repeated_step_wins(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=1)
    records = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0), (3, 5.0), (4, 4.0)]
    rewrite(directory, [json.dumps({"step": step, "loss": loss}) for step, loss in records])
    series = load_run(directory).series("loss")
    assert series.steps.tolist() == [1, 2, 3, 4]
    assert series.values.tolist() == [9, 6, 5, 4]


def test_steps_from_before_a_resume_do_not_outlive_it(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=1)
    records = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)]
    rewrite(directory, [json.dumps({"step": step, "loss": loss}) for step, loss in records])
    assert load_run(directory).series("loss").steps.tolist() == [1, 2]


@pytest.mark.parametrize("text", ["NaN", '"NaN"', '"nan"', "null"])
def test_non_finite_spellings(make_run: RunBuilder, text: str) -> None:
    directory = make_run("a", steps=1)
    rewrite(directory, ['{"step": 1, "loss": 3.0}', f'{{"step": 2, "loss": {text}}}'])
    run = load_run(directory)
    assert math.isnan(run.series("loss").values[1])
    assert math.isnan(run.final_train_loss), "a run that ended as NaN must not look fine"


def test_infinity_and_values_that_are_no_numbers(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=1)
    rewrite(directory, ['{"step": 1, "loss": "-Infinity", "note": "resumed", "list": [1]}'])
    run = load_run(directory)
    assert run.series("loss").values[0] == -math.inf
    assert not run.has("note")
    assert not run.has("list")


@pytest.mark.parametrize("layers", [1, 100])
def test_layer_grid(make_run: RunBuilder, layers: int) -> None:
    run = load_run(make_run("a", layers=layers, steps=30))
    grid = run.layer_grid("mone/load_entropy")
    assert grid.layers == tuple(range(1, layers + 1))
    assert grid.steps.tolist() == [10, 20, 30]
    for row, layer in zip(grid.values, grid.layers, strict=True):
        np.testing.assert_array_equal(row, run.series(f"mone/load_entropy/layer_{layer}").values)


def test_layer_grid_with_dense_layers_and_gaps(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=1)
    rewrite(
        directory,
        [
            '{"step": 1, "loss": 1, "mone/mass_kept/layer_10": 0.5, "mone/mass_kept/layer_3": 0.3}',
            '{"step": 2, "loss": 1, "mone/mass_kept/layer_3": 0.4}',
        ],
    )
    grid = load_run(directory).layer_grid("mone/mass_kept")
    assert grid.layers == (3, 10)
    np.testing.assert_array_equal(grid.values, [[0.3, 0.4], [0.5, math.nan]])


def test_layer_grid_not_recorded(make_run: RunBuilder) -> None:
    run = load_run(make_run("a", layer_interval=0))
    with pytest.raises(ValueError, match=r"logging\.layer_interval"):
        run.layer_grid("mone/mass_kept")


def break_metrics(text: str) -> Callable[[Path], None]:
    return lambda run_dir: rewrite(run_dir, [text])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run_dir: os.remove(run_dir / "config.yaml"), r"config\.yaml does not exist"),
        (lambda run_dir: os.remove(run_dir / "metrics.jsonl"), r"metrics\.jsonl does not exist"),
        (lambda run_dir: os.remove(run_dir / "run.json"), r"run\.json does not exist"),
        (break_metrics(""), r"metrics\.jsonl holds no step"),
        (break_metrics('{"step": 1, "lo'), r"metrics\.jsonl holds no step"),
        (break_metrics('rubbish\n{"step": 1}'), r"metrics\.jsonl line 1 is not a JSON object"),
        (break_metrics('[1]\n{"step": 1}'), r"metrics\.jsonl line 1 is not a JSON object"),
        (break_metrics('{"loss": 1}'), r"metrics\.jsonl line 1 has no whole number 'step'"),
        (break_metrics('{"step": 1, "lr": 1}'), r"metrics\.jsonl has no 'loss'"),
        (lambda run_dir: (run_dir / "run.json").write_text("{"), r"run\.json is not JSON"),
        (lambda run_dir: (run_dir / "run.json").write_text("{}"), r"run\.json has no 'status'"),
        (lambda run_dir: (run_dir / "config.yaml").write_text("a: [\n"), r"config\.yaml is not"),
        (lambda run_dir: (run_dir / "config.yaml").write_text(""), r"config\.yaml holds no"),
        (lambda run_dir: (run_dir / "metrics.jsonl").write_bytes(b"\xff\xfe\0"), "as text"),
    ],
)
def test_bad_files_are_named_in_one_line(
    make_run: RunBuilder, damage: Callable[[Path], object], message: str
) -> None:
    directory = make_run("a", steps=3)
    damage(directory)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)
    assert ": " in str(caught.value), "the fix follows a colon"


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_run(tmp_path / "absent")


def test_summary_without_optional_fields(make_run: RunBuilder) -> None:
    directory = make_run("some_run", steps=3)
    (directory / "run.json").write_text('{"status": "running", "seconds": null}')
    run = load_run(directory)
    assert run.name == "some_run"
    assert run.seed == 1234, "falls back on the configuration"
    assert run.summary.parameters == {}
    assert run.summary.seconds is None


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_tail_mean_is_of_the_last_values(values: list[float]) -> None:
    series = Series(np.arange(1, len(values) + 1), np.array(values))
    assert series.tail_mean(1.0) == pytest.approx(np.mean(values))
    assert series.tail_mean(1e-9) == values[-1]
