"""Which pictures there are of what was found, and what is in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mone_megatron.evaluation.estimates import Difference, ratio
from mone_megatron.evaluation.harness import Score
from mone_megatron.lab.sparsification.figures import (
    figures,
    file_names,
    loss_figure,
    rise_figure,
)
from mone_megatron.lab.sparsification.findings import Kind, Layer, Point, Study


def point(score: str, share: float, loss: float, accuracy: float | None) -> Point:
    made = [Score("text", "loss", ratio([loss, loss]), False, None, "")]
    if accuracy is not None:
        made.append(Score("task", "acc", ratio([accuracy, accuracy]), True, 0, ""))
    changes = tuple(Difference(loss - 4.0, 0.01, True) for _ in made)
    return Point(score, share, share, tuple(made), changes)


def study(label: str, accuracy: float | None, *scores: str) -> Study:
    """Half of the neurons cost 1 nat and half of the accuracy."""
    half = None if accuracy is None else accuracy / 2
    points = [point(score, 0.5, 5.0, half) for score in scores]
    return Study(
        label=label,
        where="nowhere",
        targets=("routed",),
        layers=(Layer(0, (Kind("routed", 8, 8, 2),)),),
        tokens=10,
        dense=point("none", 0.0, 4.0, accuracy),
        points=tuple(points),
        statistics=(),
        budget=None,
    )


def rising(rise: float) -> Study:
    """A study whose only pruning costs ``rise``."""
    return replace(study("a", None, "wina"), points=(point("wina", 0.5, 4.0 + rise, None),))


def test_a_model_that_answers_nothing_right_has_no_relative_score() -> None:
    drawn = dict(figures([study("a", 0.0, "wina"), study("b", None, "wina")]))
    assert set(drawn) == {"sparsification.png", "rise_a.png", "rise_b.png"}
    drawn = dict(figures([study("a", 0.0, "wina"), study("b", 0.5, "wina")]))
    (line,) = [
        line for line in drawn["relative.png"].axes[0].lines if line.get_label() in ("a", "b")
    ]
    assert line.get_label() == "b"
    np.testing.assert_allclose(line.get_xydata(), [(0, 1), (0.5, 0.5)])


def test_labels_that_look_alike_as_files_do_not_share_one() -> None:
    assert file_names(["runs/a", "b"]) == ["runs_a", "b"]
    assert file_names(["a/b", "a b", "c"]) == ["1_a_b", "2_a_b", "3_c"]


def test_losses_stand_whole_on_their_axis() -> None:
    figure = loss_figure([rising(1e-4)])
    figure.canvas.draw()
    shown = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert figure.axes[0].yaxis.get_offset_text().get_text() == ""
    assert all(text.startswith(("3.99", "4.00")) for text in shown)


def test_without_a_rise_the_figure_says_so() -> None:
    texts = [text.get_text() for text in rise_figure(rising(1e-5)).axes[0].texts]
    assert "no rise above 0.0001" in texts
    texts = [text.get_text() for text in rise_figure(rising(0.1)).axes[0].texts]
    assert "no rise above 0.0001" not in texts


def test_scores_are_told_apart_for_each_model() -> None:
    drawn = dict(figures([study("x/y", None, "wina", "random")]))
    assert set(drawn) == {"sparsification.png", "rise_x_y.png", "scores_x_y.png"}
    assert [line.get_label() for line in drawn["sparsification.png"].axes[0].lines] == ["x/y"]
    lines = drawn["scores_x_y.png"].axes[0].lines
    assert [line.get_label() for line in lines] == ["wina", "random"]
    np.testing.assert_allclose(lines[0].get_xydata(), [(0, 4), (0.5, 5)])
    # The unpruned model has not risen.
    rise = drawn["rise_x_y.png"].axes[0].lines[0].get_ydata()
    assert np.isnan(rise[0])
    assert rise[1] == pytest.approx(1.0)
