from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest

from mone_megatron.report.page import (
    MAX_CURVE_POINTS,
    MAX_HEATMAP_COLUMNS,
    Page,
    thin,
    thin_grid,
)
from mone_megatron.report.plots import (
    comparison_figure,
    loss_figure,
    png_data_uri,
    write_loss_plot,
)
from mone_megatron.report.run_page import write_report
from mone_megatron.report.runs import LayerGrid, Series, load_run

RunBuilder = Callable[..., Path]
NASTY = "<script>alert(1)</script> & \"x\" 'y' $z_"


class PageReader(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that are left open."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded

    def visible(self) -> str:
        return " ".join(" ".join(self.text).split())


def read_report(run_dir: Path) -> PageReader:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return PageReader(path.read_text(encoding="utf-8"))


def test_report_is_self_contained(make_run: RunBuilder) -> None:
    page = read_report(make_run("a"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:")
    script = "".join(page.scripts).replace("http://www.w3.org/2000/svg", "")
    assert "http" not in script
    assert "fetch(" not in script
    assert len(page.scripts) == 2


def test_headline_figures(make_run: RunBuilder) -> None:
    page = read_report(make_run("a", name="tiny_mone", steps=40, loss=lambda step: 10 - step / 10))
    text = page.visible()
    # The last two of 40 steps: 6.1 and 6.0.
    assert "Train loss 6.0500 mean of the last 5% of steps" in text
    assert "Validation loss 6.5000 at step 40" in text
    assert "Tokens 20.5K" in text
    assert "Tokens per second 1.02K" in text
    assert "TFLOPS 0.02 realised; ideal 0.03" in text
    assert "Parameters 12.3M total" in text
    assert "Activated, gate counted 5.00M 41% of total" in text
    assert "Activated, neurons only 4.00M 32% of total" in text
    assert "unfinished" not in text


def test_every_drawn_card_has_its_data(make_run: RunBuilder) -> None:
    page = read_report(make_run("a"))
    data = page.data()
    drawn = {
        kind: {attrs["data-id"] for _, attrs in page.tags if attrs.get("class") == kind}
        for kind in ("chart", "heatmap")
    }
    assert drawn["chart"] == set(data["charts"])
    assert drawn["heatmap"] == set(data["heatmaps"])
    titles = [chart["title"] for chart in data["charts"].values()]
    assert len(titles) == len(set(titles))
    for title in (
        "Loss",
        "Expert balance loss (per batch)",
        "Router z-loss",
        "Neuron balance loss",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "TFLOPS",
        "Tokens per expert",
        "Dead experts",
        "Neuron load entropy",
        "Dead neurons",
        "Largest / mean neuron load",
        "Share of |a| mass kept",
    ):
        assert title in titles
    loss = data["charts"]["chart0"]["series"]
    assert [series["kind"] for series in loss] == ["faint", "line", "points"]
    assert loss[2]["x"] == [10, 20, 30, 40]


@pytest.mark.parametrize("layers", [1, 100])
def test_layer_panels(make_run: RunBuilder, layers: int) -> None:
    run_dir = make_run("a", layers=layers, steps=30)
    page = read_report(run_dir)
    heatmaps = page.data()["heatmaps"].values()
    # Tokens per expert min, max, std and four neuron metrics; what is constant is told in words.
    assert len(heatmaps) == 7 + (layers > 1)
    assert "64 everywhere" in page.visible()
    for heatmap in heatmaps:
        assert heatmap["layers"] == list(range(1, layers + 1))
        assert heatmap["steps"] == [10, 20, 30]
        assert np.array(heatmap["values"]).shape == (layers, 3)
    entropy = next(c for c in page.data()["charts"].values() if c["title"] == "Neuron load entropy")
    line = entropy["series"][0]
    grid = load_run(run_dir).layer_grid("mone/load_entropy").values
    np.testing.assert_allclose(line["y"], grid.mean(axis=0), rtol=1e-5)
    assert ("low" in line) == (layers > 1)
    if layers > 1:
        np.testing.assert_allclose(line["high"], grid.max(axis=0), rtol=1e-5)


def test_report_of_a_baseline_says_mone_is_off(make_run: RunBuilder) -> None:
    text = read_report(make_run("a", mone=False)).visible()
    assert "MoNE is off in this run" in text
    assert "Tokens per expert" in text
    assert "Neuron load entropy" not in text


def test_report_says_why_layer_panels_are_empty(make_run: RunBuilder) -> None:
    text = read_report(make_run("a", layer_interval=0)).visible()
    assert text.count("Not recorded: logging.layer_interval is 0.") == 2
    text = read_report(make_run("b", steps=5)).visible()
    assert text.count("the run stopped before step 10 (logging.layer_interval)") == 2
    dense = make_run("c", layer_interval=0, mone=False, config={"model": {"num_experts": 0}})
    assert "The model is dense" in read_report(dense).visible()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("interrupted", "Interrupted at step 12 of 100"),
        ("failed", "Failed at step 12 of 100"),
        ("running", "Still running, or killed without a word, at step 12 of 100"),
        ("odd", "Status 'odd' at step 12 of 100"),
    ],
)
def test_banner_of_an_unfinished_run(make_run: RunBuilder, status: str, sentence: str) -> None:
    directory = make_run("a", steps=12, status=status, config={"train": {"steps": 100}})
    assert sentence in read_report(directory).visible()


def test_divergence_and_broken_lines_are_told(make_run: RunBuilder) -> None:
    directory = make_run("a", steps=20, loss=lambda step: math.nan if step > 15 else 3.0)
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step"')
    page = read_report(directory)
    assert "not finite at 5 of 20 steps, first at step 16" in page.visible()
    assert "1 half-written line" in page.visible()
    assert "Train loss nan" in page.visible()
    assert page.data()["charts"]["chart0"]["series"][0]["y"][-5:] == [None] * 5


def test_all_text_is_escaped(make_run: RunBuilder) -> None:
    directory = make_run("a", name=NASTY, config={"data": {"tokenizer": "</pre><img src=x>"}})
    summary = json.loads((directory / "run.json").read_text())
    summary["versions"] = {NASTY: NASTY}
    (directory / "run.json").write_text(json.dumps(summary))
    page = read_report(directory)
    assert len(page.scripts) == 2, "a name must not become a script"
    assert page.visible().count("<script>alert(1)</script>") >= 3
    assert "</pre><img src=x>" in page.visible()


def test_data_cannot_end_its_script_element() -> None:
    page = Page("t")
    page.chart("</script><!--", [])
    reader = PageReader(page.render())
    assert reader.data()["charts"]["chart0"]["title"] == "</script><!--"


def test_long_runs_are_thinned_without_losing_spikes() -> None:
    values = np.sin(np.arange(100_000) / 5000)
    values[43_210] = 99
    values[70_000] = math.nan
    series = thin(Series(np.arange(1, 100_001), values))
    assert len(series) <= MAX_CURVE_POINTS + 2
    assert series.values[series.steps == 43_211] == [99]
    assert np.isnan(series.values[series.steps == 70_001]).all()
    assert series.steps[0] == 1
    assert series.steps[-1] == 100_000
    assert (np.diff(series.steps) > 0).all()


def test_heatmap_columns_are_means_of_neighbours() -> None:
    columns = 2 * MAX_HEATMAP_COLUMNS
    values = np.arange(2.0 * columns).reshape(2, columns)
    values[0, 0] = math.nan
    values[1, 2:4] = math.nan
    grid = thin_grid(LayerGrid((1, 2), np.arange(1, columns + 1), values))
    assert grid.values.shape == (2, MAX_HEATMAP_COLUMNS)
    assert grid.values[0, 0] == 1
    assert grid.values[1, 0] == columns + 0.5
    assert np.isnan(grid.values[1, 1])
    assert grid.steps[:2].tolist() == [2, 4]


def test_nothing_is_left_half_written(
    make_run: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_run("a", steps=5)
    write_report(directory)
    whole = (directory / "report.html").read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(directory)
    assert (directory / "report.html").read_text() == whole
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["config.yaml", "metrics.jsonl", "run.json", "report.html"]
    )


def test_loss_plot(make_run: RunBuilder) -> None:
    before = dict(mpl.rcParams)
    path = write_loss_plot(make_run("a", name=NASTY, steps=60))
    assert path.name == "loss.png"
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (700, 1200)
    assert dict(mpl.rcParams) == before
    figure = loss_figure(load_run(path.parent))
    top, bottom = figure.axes
    labels = [text.get_text() for text in top.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["train", "train, smoothed", "validation"]
    assert bottom.get_ylabel() == "lr"
    assert re.match(r"data:image/png;base64,[A-Za-z0-9+/=]+$", png_data_uri(figure))


@pytest.mark.parametrize("steps", [1, 2])
def test_loss_plot_of_very_short_and_diverged_runs(make_run: RunBuilder, steps: int) -> None:
    write_loss_plot(make_run("a", steps=steps, eval_interval=0))
    write_loss_plot(make_run("b", steps=steps, loss=lambda _: math.nan))
    write_report(make_run("c", steps=steps, loss=lambda _: math.inf))


def test_limits_leave_out_a_spike_but_not_the_start(make_run: RunBuilder) -> None:
    def loss(step: int) -> float:
        return 500.0 if step == 300 else 9.0 if step == 1 else 3.0

    figure = loss_figure(load_run(make_run("a", steps=600, loss=loss, eval_interval=0)))
    low, high = figure.axes[0].get_ylim()
    assert low < 3
    assert 9 < high < 20


def test_comparison_figure_of_one_run_has_no_empty_panel() -> None:
    from mone_megatron.report.plots import ComparedCurve

    curve = ComparedCurve("a", Series(np.array([1]), np.array([2.0])), None, None, None, None)
    assert len(comparison_figure([curve], "a").axes) == 1
