"""What the pictures of an analysis show."""

from __future__ import annotations

from pathlib import Path

from routing_traces import make_trace

from mone_megatron.lab.routing.figures import (
    neuron_figure,
    saturation_figure,
    specialisation_figure,
)
from mone_megatron.lab.routing.statistics import Limits
from mone_megatron.lab.routing.statistics_files import Analysis
from mone_megatron.lab.routing.subjects import Subject, analyze

LIMITS = Limits(min_count=1)


def two_checkpoints(folder: Path) -> Analysis:
    kept = {1: [["1100", "0110"], ["0011", "1100"], ["1010", "0101"]]}
    chosen = []
    for step, first in ((10, [0, 1]), (20, [1, 2])):
        trace = make_trace(
            folder / str(step),
            {1: [first, [1, 2], [2, 0]]},
            experts=3,
            ids=[5, 5, 6],
            kept=kept,
            name=f"step {step}",
            step=step,
        )
        chosen.append(Subject(str(trace.folder), f"step {step}", "trace"))
    header, results = analyze(chosen, None, LIMITS, keep=None)
    return Analysis(results, header, LIMITS, {})


def test_one_earlier_checkpoint_can_be_read(tmp_path: Path) -> None:
    """Where there is no line to be dashed, markers tell what is and what chance would share."""
    figure = saturation_figure(two_checkpoints(tmp_path))
    assert figure is not None
    for axes in figure.axes:
        figure.canvas.draw()
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10"]
        looks = [(line.get_color(), line.get_fillstyle()) for line in axes.get_lines()]
        assert len(set(looks)) == len(looks)
        independent = [
            line.get_fillstyle()
            for line in axes.get_lines()
            if "independent" in str(line.get_label())
        ]
        assert independent == ["none"]


def test_every_axis_says_what_it_counts(tmp_path: Path) -> None:
    analysis = two_checkpoints(tmp_path)
    for draw in (saturation_figure, specialisation_figure, neuron_figure):
        figure = draw(analysis)
        assert figure is not None
        assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
