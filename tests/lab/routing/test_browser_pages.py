"""The pages in a real browser: no errors, no network, and they react."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from chromium_browser import PATIENCE, Browser, Tab
from routing_traces import make_trace

from mone_megatron.lab.routing.explorer import explorer_page, write_explorer
from mone_megatron.lab.routing.statistics import Limits, measure
from mone_megatron.lab.routing.statistics_files import Analysis
from mone_megatron.report.run_page import write_report

# Tokens with their experts and kept neurons; token 5 is <5>, and so on.
EXPERTS = {1: [[0, 1], [0, 2], [1, 0], [0, 1]], 2: [[2, 1], [1, 0], [1, 2], [2, 1]]}
KEPT = {layer: [["1100", "0110"], ["1100", "1010"]] * 2 for layer in EXPERTS}
LIMITS = Limits(min_count=1, experts_together=2)
VISIBLE = "getComputedStyle(document.querySelector('{}')).display !== 'none'"


def tip(tab: Tab, card: str) -> str:
    """What the readout over a card says."""
    assert tab.evaluate(VISIBLE.format(f"{card} .tip")), f"no readout in {card}"
    return tab.text(f"{card} .tip")


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    folder = tmp_path_factory.mktemp("traces")
    earlier_experts = {1: EXPERTS[2], 2: EXPERTS[1]}
    common = {"experts": 3, "kept": KEPT, "ids": [5, 6, 5, 7], "domains": [0, 0, 1, 1]}
    names = {"domain_names": ["code", "</script><b>prose"]}
    traces = [
        make_trace(folder / f"{step}", experts, name=f"step {step}", step=step, **common, **names)
        for step, experts in ((10, earlier_experts), (20, EXPERTS))
    ]
    measured = [measure(traces[0], traces[1], LIMITS), measure(traces[1], None, LIMITS)]
    return Analysis(measured, traces[1].header, LIMITS, {})


def test_the_explorer_reacts(browser: Browser, analysis: Analysis, tmp_path: Path) -> None:
    tab = browser.open(write_explorer(analysis, tmp_path))
    assert tab.text("h1") == "Routing of step 20"
    assert tab.text("#neurons h3") == "Neurons of expert 0"
    # Hover: all four tokens of layer 1 go to expert 0.
    tab.hover("#loads canvas", 0.1, 0.12)
    assert tip(tab, "#loads") == "layer 1, expert 0: 100% of tokens"
    tab.hover("#together canvas", 0.5, 0.15)
    assert tip(tab, "#together") == ("of the tokens of expert 0, 75% also go to 1 (of all 75%)")
    # A domain whose name is markup is text.
    tab.hover("#domains canvas", 0.5, 0.4)
    assert "of the tokens of </script><b>prose go to expert 1" in tip(tab, "#domains")
    tab.hover("#neurons canvas", 0.048, 0.5)
    assert tip(tab, "#neurons").startswith("neuron 1: kept by 100% of the tokens")
    tab.hover("#pairs canvas", 0.4, 0.15)
    assert tip(tab, "#pairs").startswith("of the tokens that keep 1, 75% keep 0")
    # A click chooses layer and expert.
    tab.click("#loads canvas", 0.9, 0.45)
    assert tab.evaluate("document.querySelector('select[name=layer]').value") == "1"
    assert tab.evaluate("document.querySelector('select[name=expert]').value") == "2"
    assert tab.text("#together h3") == "Experts together, layer 2"
    assert tab.text("#neurons h3") == "Neurons of expert 2"
    # Expert 2 of the second layer is one of its two busiest, expert 0 is not.
    assert tab.evaluate(VISIBLE.format("#pairs"))
    tab.choose("select[name=expert]", 0)
    assert not tab.evaluate(VISIBLE.format("#pairs"))
    assert "for the busiest experts of this layer only: 1, 2." in tab.text("#unpaired")
    # Filters.
    tab.choose("select[name=layer]", 0)
    tab.choose("select[name=expert]", 0)
    rows = "document.querySelectorAll('#tokens tr').length"
    assert tab.evaluate(rows) == 1 + 3
    tab.choose("input[name=token]", "6")
    assert tab.evaluate(rows) == 1 + 1
    assert "<6>" in tab.text("#tokens table")
    tab.choose("input[name=token]", "no such")
    assert "No token fits" in tab.text("#tokens .rows")
    assert tab.text("#neuron-count") == "4 of 4 neurons shown"
    tab.choose("select[name=only]", "dead")
    assert tab.text("#neuron-count").startswith("neuron 3: kept by 0% of the tokens")
    tab.choose("select[name=only]", "all")
    tab.choose("input[name=neuron]", "2")
    assert tab.text("#neuron-count").startswith("neuron 2: kept by ")
    # Another checkpoint.
    before = tab.text("select[name=expert]")
    tab.choose("select[name=checkpoint]", 0)
    assert tab.text("select[name=expert]") != before
    assert "shared with the last checkpoint" in tab.text("#neurons .note")
    assert tab.problems() == []
    tab.close()


def test_what_is_left_out_of_the_page_is_told(
    browser: Browser, analysis: Analysis, tmp_path: Path
) -> None:
    path = tmp_path / "small.html"
    # Room for the two layers of the last checkpoint.
    path.write_text(explorer_page(analysis, max_numbers=900), encoding="utf-8")
    tab = browser.open(path)
    assert tab.text("#missing") == ""
    tab.choose("select[name=checkpoint]", 0)
    assert "left out of the page" in tab.text("#missing")
    assert not tab.evaluate(VISIBLE.format("#neurons"))
    assert tab.problems() == []
    tab.close()


def test_the_training_report_reacts(browser: Browser, make_run: Callable[..., Path]) -> None:
    run = make_run("run", steps=120)
    alert = {
        "step": 10, "event": "begin", "kind": "load_collapse", "part": "routed", "layer": 1,
        "expert": 0, "value": 0.05, "threshold": 0.1,
        "message": "load_collapse: layer 1, expert 0: " + "spread by 0.05; look around; " * 9,
    }  # fmt: skip
    (run / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    tab = browser.open(write_report(run))
    # The kind of an alert is one word, on one line.
    lines = (
        "(() => { const range = document.createRange(); range.selectNodeContents("
        "[...document.querySelectorAll('td')].find(cell => cell.textContent === 'load_collapse')"
        "); return range.getClientRects().length })()"
    )
    assert tab.evaluate(lines) == 1
    assert tab.evaluate("document.querySelectorAll('.chart svg').length") == tab.evaluate(
        "document.querySelectorAll('.chart').length"
    )
    assert tab.evaluate("[...document.querySelectorAll('.heatmap canvas')].every(c => c.width)")
    chart = ".chart[data-id=chart0]"
    ticks = f"[...document.querySelectorAll('{chart} svg text')].map(t => t.textContent)"
    tab.hover(f"{chart} svg", 0.5, 0.5)
    assert tip(tab, chart).startswith("step ")
    assert "train, smoothed: " in tip(tab, chart)
    whole = tab.evaluate(ticks)
    tab.drag(f"{chart} svg", 0.3, 0.6)
    zoomed = tab.evaluate(ticks)
    assert zoomed != whole
    assert "120" not in zoomed
    tab.click(f"{chart} svg", 0.5, 0.5, times=2)
    assert tab.evaluate(ticks) == whole
    tab.hover(".heatmap canvas", 0.5, 0.3)
    assert tip(tab, ".heatmap").startswith("layer ")
    assert tab.problems() == []
    tab.close()


def test_problems_are_seen(browser: Browser, tmp_path: Path) -> None:
    """The tests above would notice."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<script>console.error('one'); setTimeout(() => { throw new Error('two'); });</script>"
        "<img src='http://example.invalid/three.png'>"
    )
    tab = browser.open(path)
    expected = ("one", "two", "asked for http://example.invalid/three.png")
    deadline = time.monotonic() + PATIENCE
    # A page is drawn before its timer is due, on a busy machine.
    while missing := [text for text in expected if text not in " ".join(tab.problems())]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
    tab.close()


def _until(tab: Tab, condition: str) -> None:
    """Until a condition holds, also when the page is read again while it is asked."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with suppress(AssertionError):
            if tab.evaluate(condition):
                return
        time.sleep(0.05)
    raise AssertionError(condition)


def test_the_page_of_a_running_run_reads_itself_again(
    browser: Browser, make_run: Callable[..., Path]
) -> None:
    run = make_run("run", steps=120, status="running")
    newer = write_report(make_run("other", steps=130, status="running"), reload_seconds=3600)
    tab = browser.open(write_report(run, reload_seconds=3600))
    assert tab.text("#live").startswith("The run is going, at step 120 of 120. Written ")
    assert tab.text("#live").endswith("ago; this page reads itself again.")
    tab.evaluate("document.querySelector('details').open = true")
    # Nothing is read again under a reader who looks closely.
    chart = ".chart[data-id=chart3] svg"
    tab.drag(chart, 0.3, 0.6)
    place = tab.evaluate("scrollY")
    assert place > 0
    newer.replace(run / "report.html")
    # An hour later.
    tab.evaluate("Date.now = () => 3600000 + new Date().getTime()")
    _until(tab, "document.querySelector('#live').textContent.includes('zoomed')")
    assert "at step 120" in tab.text("#live")
    tab.click(chart, 0.5, 0.5, times=2)
    _until(tab, "document.querySelector('#live').textContent.includes('at step 130')")
    assert tab.evaluate("scrollY") == place
    assert tab.evaluate("document.querySelector('details').open") is True
    assert tab.problems() == []
    tab.close()
