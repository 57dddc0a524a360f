"""The results file: whole lines, and refusal of what does not belong together."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mone_megatron.evaluation.estimates import Estimate, difference
from mone_megatron.evaluation.harness import Score
from mone_megatron.lab.sparsification.kept_results import (
    FILE,
    open_results,
    score_from_json,
    score_to_json,
)

SETTINGS = {"seq_length": 64, "tasks": ["sciq"]}


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    results = open_results(tmp_path / "new", SETTINGS)
    assert len(results) == 0
    results.add({"model": "a", "shares": [0.5, 0.25]}, {"loss": 1.5})
    again = open_results(tmp_path / "new", SETTINGS)
    # Whatever the order of a key's parts.
    assert again.get({"shares": [0.5, 0.25], "model": "a"}) == {"loss": 1.5}
    assert again.get({"shares": [0.25, 0.5], "model": "a"}) is None
    again.same_or_add({"model": "b"}, {"where": "x"}, "models")
    again.same_or_add({"model": "b"}, {"where": "x"}, "models")
    with pytest.raises(ValueError, match="results of other models: where was 'x' and is 'y'"):
        again.same_or_add({"model": "b"}, {"where": "y"}, "models")


def test_a_line_that_was_not_finished_is_dropped(tmp_path: Path) -> None:
    results = open_results(tmp_path, SETTINGS)
    for number in range(3):
        results.add({"number": number}, {"value": number})
    whole = (tmp_path / FILE).read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:cut])
        again = open_results(tmp_path, SETTINGS)
        finished = whole[:cut].count(b"\n")
        assert len(again) == max(0, finished - 1)
        # Without settings it begins anew.
        assert (tmp_path / FILE).read_bytes() == b"".join(lines[: max(1, finished)])
        again.add({"number": 9}, {"value": 9})
        assert open_results(tmp_path, SETTINGS).get({"number": 9}) == {"value": 9}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    open_results(tmp_path, SETTINGS)
    with pytest.raises(
        ValueError, match="of other settings: seq_length was 64 and is 32"
    ) as caught:
        open_results(tmp_path, SETTINGS | {"seq_length": 32})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="dtype was None and is 'fp32'"):
        open_results(tmp_path, SETTINGS | {"dtype": "fp32"})


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no results\.jsonl"):
        open_results(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"holds files and no results\.jsonl"):
        open_results(tmp_path / "notes.txt", SETTINGS)
    (tmp_path / FILE).write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="is damaged"):
        open_results(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (1, b'{"settings": 5}'), (1, b"[1]"), (2, b"{"), (2, b"[1, 2]"), (2, b'{"key": {}}'),
        (3, b'{"key": "a", "value": {}}'), (3, b"\xff\xfe\x00"),
    ],
)  # fmt: skip
def test_damaged_lines_are_named_and_stay(tmp_path: Path, number: int, line: bytes) -> None:
    results = open_results(tmp_path, SETTINGS)
    for each in range(3):
        results.add({"number": each}, {"value": each})
    lines = (tmp_path / FILE).read_bytes().splitlines()
    lines[number - 1] = line
    damaged = b"\n".join(lines) + b"\n"
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{FILE}: line {number} is damaged.*--output"):
        open_results(tmp_path, SETTINGS)
    assert (tmp_path / FILE).read_bytes() == damaged


def test_a_result_that_is_no_score_is_named(tmp_path: Path) -> None:
    results = open_results(tmp_path, SETTINGS)
    results.add({"model": "a"}, {"score": {"nothing": 1}})
    with pytest.raises(ValueError, match=r'result of \{"model": "a"\} is damaged.*--output'):
        results.read({"model": "a"}, lambda kept: score_from_json(kept["score"]))
    with pytest.raises(ValueError, match="is damaged"):
        results.read({"model": "a"}, lambda kept: kept["scores"])


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(ValueError, match=r"--output: nothing can be written in /proc .*folder"):
        open_results(Path("/proc/nowhere/at/all"), SETTINGS)


def test_scores_keep_what_paired_differences_need() -> None:
    generator = np.random.default_rng(0)
    scores = [
        Score(
            "text",
            "perplexity",
            Estimate(value, 4, generator.normal(size=4), np.zeros(0)),
            False,
            None,
            "abc",
        )
        for value in (2.0, math.inf)
    ]
    again = [score_from_json(score_to_json(score)) for score in scores]
    for one, other in zip(scores, again, strict=True):
        assert (one.task, one.metric, one.samples) == (other.task, other.metric, other.samples)
        assert one.estimate.stderr == other.estimate.stderr
    before = difference(scores[0].estimate, scores[1].estimate, same_samples=True)
    after = difference(again[0].estimate, again[1].estimate, same_samples=True)
    assert before == after
