"""Alerts and the experts of the last panel in ``report.html``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_megatron.report.panel_files import read_alerts, read_last_panel
from mone_megatron.report.run_page import write_report

RunBuilder = Callable[..., Path]


def _alert(step: int, event: str, kind: str, **more: Any) -> dict[str, Any]:
    place = {"part": "routed", "layer": 2, "expert": 5} | more
    message = f"{kind}: {event} <b>at</b> {place['layer']}"
    return {"step": step, "event": event, "kind": kind, **place} | {
        "value": 0.0123,
        "threshold": 0.05,
        "message": message,
    }


def _write(run: Path, alerts: list[dict[str, Any]], end: str = "") -> None:
    lines = "".join(json.dumps(alert) + "\n" for alert in alerts)
    (run / "alerts.jsonl").write_text(lines + end, encoding="utf-8")


def _page(run: Path) -> tuple[str, dict[str, Any]]:
    """Markup without scripts, and the data that the charts draw."""
    text = write_report(run).read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL), json.loads(data[1])


def _marks(data: dict[str, Any]) -> dict[str, list[int]]:
    return {
        chart["title"]: [mark["x"] for mark in chart["marks"]]
        for chart in data["charts"].values()
        if chart["marks"]
    }


def test_alerts_are_listed_and_marked(make_run: RunBuilder) -> None:
    run = make_run("a")
    alerts = [
        _alert(10, "begin", "dead_expert"),
        _alert(20, "begin", "dead_neurons", expert=1),
        _alert(20, "begin", "dead_neurons", part="shared", expert=0),
        _alert(30, "end", "dead_expert"),
        _alert(40, "begin", "dead_expert"),
        _alert(40, "begin", "load_collapse", part="router", layer=1, expert=3),
    ]
    _write(run, alerts, end='{"step": 50, "ev')
    spans = read_alerts(run)
    assert spans is not None
    assert [(span.kind, span.begin, span.end) for span in spans] == [
        ("dead_expert", 10, 30),
        ("dead_neurons", 20, None),
        ("dead_neurons", 20, None),
        ("dead_expert", 40, None),
        ("load_collapse", 40, None),
    ]
    text, data = _page(run)
    assert "4 alert(s) had not ended" in text
    assert "<b>at</b>" not in text
    for where in ("layer 2, expert 5", "layer 2, shared", "layer 1, router, expert 3"):
        assert f'<td class="text wrap">{where}</td>' in text
    # load_collapse of a router is not one of neurons.
    assert _marks(data) == {"Dead experts": [10, 30, 40], "Dead neurons": [20]}


def test_a_run_without_alerts_says_why(make_run: RunBuilder) -> None:
    run = make_run("a")
    assert "Not looked for: logging.layer_interval is 0" in _page(run)[0]
    _write(run, [])
    text, data = _page(run)
    assert re.search(r"Alerts</h2>.*?None\.", text, re.DOTALL)
    assert _marks(data) == {}


def test_foreign_lines_are_refused(make_run: RunBuilder) -> None:
    run = make_run("a")
    for broken in ([{"step": 3}], [_alert(10, "end", "dead_expert")]):
        _write(run, [_alert(5, "begin", "dead_neurons"), *broken])
        with pytest.raises(ValueError, match=r"alerts\.jsonl line 2 is not an alert"):
            read_alerts(run)
    for damaged in (b"[1, 2]\n", b"\xff\xfe\n{}\n"):
        (run / "alerts.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"alerts\.jsonl line 1 is not a"):
            read_alerts(run)


@pytest.mark.parametrize("line", [b"{", b"[1, 2]", b'{"step": 3}', b"\xff\xfe", b'{"layers": [4]}'])
def test_a_last_panel_that_is_none_is_named(make_run: RunBuilder, line: bytes) -> None:
    run = make_run("a")
    (run / "panel.jsonl").write_bytes(b'{"step": 1, "layers": []}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"panel\.jsonl line 2 is not a panel .*remove that line"):
        read_last_panel(run)


def test_the_table_says_kind_and_place_once(make_run: RunBuilder) -> None:
    run = make_run("a")
    message = "dead_expert: layer 2, expert 5: 0.1 of a fair share: look"
    _write(run, [_alert(10, "begin", "dead_expert") | {"message": message}])
    text, _ = _page(run)
    assert '<td class="text wrap">0.1 of a fair share: look</td>' in text
    # The banner has no columns.
    assert f"since step 10: {message}" in text


def test_the_last_panel_shows_every_expert(make_run: RunBuilder) -> None:
    run = make_run("a")
    assert read_last_panel(run) is None
    lines = []
    for step in (10, 20):
        layers = [
            {
                "mlp": mlp,
                "layer": layer,
                "balance_loss": None,
                "tokens": [step + expert for expert in range(experts)],
                "kept_activation": [None, *[0.1 * layer] * (experts - 1)],
            }
            for mlp, layer, experts in (("routed", 2, 3), ("routed", 4, 3), ("shared", 4, 1))
        ]
        lines.append(json.dumps({"step": step, "layers": layers}) + "\n")
    (run / "panel.jsonl").write_text("".join(lines) + '{"step": 30, "lay', encoding="utf-8")
    text, data = _page(run)
    assert "Each expert at step 20" in text
    drawn = [one for one in data["heatmaps"].values() if one["columns"] == "expert"]
    assert [one["values"] for one in drawn] == [
        [[20, 21, 22], [20, 21, 22]],
        [[None, 0.2, 0.2], [None, 0.4, 0.4]],
    ]
    assert all(one["layers"] == [2, 4] and one["steps"] == [0, 1, 2] for one in drawn)
