"""Writes ``report.html``: one run on one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import yaml

from mone_megatron.counting import counted
from mone_megatron.report.formatting import (
    ABSENT,
    format_count,
    format_duration,
    format_loss,
    format_number,
)
from mone_megatron.report.page import Curve, Page
from mone_megatron.report.panel_files import AlertSpan, read_alerts, read_last_panel
from mone_megatron.report.runs import METRICS_FILE, Run, Series, load_run
from mone_megatron.whole_files import write_whole

REPORT_FILE = "report.html"

_TASK_PREFIX, _STDERR = "eval/", "_stderr"
_BALANCE_LOSS = re.compile(r"(router|mone)/\w*loss")
_BALANCE_TITLES = {
    "router/load_balancing_loss": "Expert balance loss (per batch)",
    "router/seq_load_balancing_loss": "Expert balance loss (per sequence)",
    "router/global_load_balancing_loss": "Expert balance loss (global)",
    "router/z_loss": "Router z-loss",
    "mone/balance_loss": "Neuron balance loss",
}
_TOKENS_PER_EXPERT = "router/tokens_per_expert"
_EXPERT_GRIDS = (
    (f"{_TOKENS_PER_EXPERT}_min", "Tokens of the least loaded expert", ""),
    (f"{_TOKENS_PER_EXPERT}_max", "Tokens of the most loaded expert", ""),
    (f"{_TOKENS_PER_EXPERT}_mean", "Tokens per expert, mean", ""),
    (f"{_TOKENS_PER_EXPERT}_std", "Tokens per expert, standard deviation", ""),
    ("router/dead_experts", "Dead experts", "experts that no token chose"),
    ("router/load_entropy", "Router load entropy", "1 is perfectly even"),
)
_NEURON_GRIDS = (
    ("mone/load_entropy", "Neuron load entropy", "1 is perfectly even"),
    ("mone/dead_neuron_share", "Dead neurons", "share of neurons that no token kept"),
    ("mone/load_max_over_mean", "Largest / mean neuron load", "1 is perfectly even"),
    ("mone/mass_kept", "Share of |a| mass kept", "of the activation weight of all neurons"),
    ("mone/load_balance", "Balance of the load alone", "whatever the weights; 1 is perfectly even"),
    ("mone/kept_activation", "Mean |a| of kept neurons", "the scale of raw balance weights"),
    ("mone/load_overlap", "Load in common with the panel step before", "1 is no change"),
    ("mone/chunk_union_1", "Neurons that a token keeps", "of those of all experts of the layer"),
    ("mone/chunk_union_8", "Neurons that any of 8 adjacent tokens keeps", "of all of the layer"),
    ("mone/chunk_union_32", "Neurons that any of 32 adjacent tokens keeps", "of all of the layer"),
    ("mone/load_entropy_min", "Neuron load entropy of the worst expert", "1 is perfectly even"),
    ("mone/dead_neuron_share_max", "Dead neurons of the worst expert", "share of its neurons"),
)
# Counts and shares that are read against 0.
_FROM_ZERO = (
    "router/dead_experts",
    "mone/dead_neuron_share",
    "mone/dead_neuron_share_max",
    "mone/kept_activation",
    "mone/chunk_union_1",
    "mone/chunk_union_8",
    "mone/chunk_union_32",
)
# Of each expert at the last panel step: (name in panel.jsonl, title, note).
_LAST_GRIDS = (
    ("tokens", "Tokens of each expert", ""),
    ("dead_neuron_share", "Dead neurons of each expert", "share of its neurons"),
    ("load_entropy", "Neuron load entropy of each expert", "1 is perfectly even"),
    ("kept_activation", "Mean |a| of the kept neurons of each expert", ""),
)
# The curves on which alerts are marked: metric -> (kind, parts of a layer).
_MLPS = ("routed", "shared", "dense")
_MARKED = {
    "router/dead_experts": ("dead_expert", _MLPS),
    "router/load_entropy": ("load_collapse", ("router",)),
    "mone/dead_neuron_share": ("dead_neurons", _MLPS),
    "mone/dead_neuron_share_max": ("dead_neurons", _MLPS),
    "mone/load_entropy": ("load_collapse", _MLPS),
    "mone/load_entropy_min": ("load_collapse", _MLPS),
    "mone/kept_activation": ("shrinking_weights", _MLPS),
    "mone/load_balance": ("shrinking_weights", _MLPS),
    "mone/balance_loss": ("shrinking_weights", _MLPS),
}
# Alerts that a banner names; the table has all.
_ALERTS_IN_BANNER = 5


def write_report(run_dir: str | Path, *, reload_seconds: float | None = None) -> Path:
    """Writes ``report.html`` into the run directory and returns its path.

    Args:
        run_dir: of the run.
        reload_seconds: the run is going, and the page reads itself again after so long; None for
            a page that stays.

    Raises:
        ValueError: the directory is not a readable run (:func:`load_run`).
    """
    run = load_run(run_dir)
    return write_whole(run.path / REPORT_FILE, report_page(run, reload_seconds=reload_seconds))


def report_page(run: Run, *, reload_seconds: float | None = None) -> str:
    """Returns the report as the text of an HTML file that needs no other file and no network.

    Args:
        run: as it was read.
        reload_seconds: as of :func:`write_report`.
    """
    page = Page(f"{run.name}: training report")
    alerts = read_alerts(run.path)
    _head(page, run, alerts or [], reload_seconds)
    _loss(page, run, live=reload_seconds is not None)
    _tasks(page, run)
    _alerts(page, run, alerts)
    _balance(page, run, alerts or [])
    _optimisation(page, run)
    _experts(page, run, alerts or [])
    _neurons(page, run, alerts or [])
    _setup(page, run)
    return page.render()


def status_sentence(run: Run) -> str | None:
    """Returns what a reader must know about how the run ended; None when it completed."""
    planned = run.setting("train.steps")
    place = f"at step {run.last_step}" + (f" of {planned}" if planned is not None else "")
    return {
        "completed": None,
        "interrupted": f"Interrupted {place}: the figures below are those of an unfinished run.",
        "failed": f"Failed {place}: the figures below are those of an unfinished run.",
        "running": f"Still running, or killed without a word, {place}.",
    }.get(run.summary.status, f"Status {run.summary.status!r} {place}.")


def _head(page: Page, run: Run, alerts: Sequence[AlertSpan], reload_seconds: float | None) -> None:
    summary = run.summary
    page.raw("<header>")
    page.heading_one(run.name)
    facts = [
        "MoNE" if run.setting("mone.enabled") else "MoE baseline, no neuron selection",
        counted(run.last_step, "step"),
        "" if summary.world_size is None else counted(summary.world_size, "process"),
        str(summary.hardware or summary.device or "unknown hardware"),
        f"started {summary.started}" if summary.started else "",
        f"took {format_duration(summary.seconds)}" if summary.seconds else "",
    ]
    page.note(" · ".join(fact for fact in facts if fact))
    page.raw("</header>")
    if reload_seconds is not None:
        planned = run.setting("train.steps")
        of_all = "" if planned is None else f" of {planned}"
        now = datetime.now(timezone.utc)
        page.live(f"The run is going, at step {run.last_step}{of_all}.", now, reload_seconds)
    elif sentence := status_sentence(run):
        page.banner("bad" if summary.status == "failed" else "warn", sentence)
    loss = run.series("loss")
    diverged = loss.steps[~np.isfinite(loss.values)]
    if len(diverged):
        page.banner(
            "bad",
            f"The loss was not finite at {len(diverged)} of {len(loss)} steps, first at step "
            f"{diverged[0]}.",
        )
    # The line that is being written is none that a killed process left.
    if run.broken_lines and reload_seconds is None:
        page.banner(
            "warn",
            f"{METRICS_FILE} holds {run.broken_lines} half-written line(s), as a killed process "
            "leaves; the step(s) in them are missing here.",
        )
    if lasting := [alert for alert in alerts if alert.end is None]:
        shown = [f"since step {one.begin}: {one.message}" for one in lasting[:_ALERTS_IN_BANNER]]
        if len(lasting) > len(shown):
            shown.append(f"and {len(lasting) - len(shown)} more, under Alerts")
        page.banner("warn", f"{len(lasting)} alert(s) had not ended:", shown)
    parameters = run.parameters
    total = parameters.get("total")
    how = ", measured over the last quarter" if summary.measured_parameters else ""

    def share(key: str) -> str:
        if not total or key not in parameters:
            return ""
        return f"{parameters[key] / total:.0%} of total{how}"

    validation = run.final_validation_loss
    page.tiles(
        [
            ("Train loss", format_loss(run.final_train_loss), "mean of the last 5% of steps"),
            (
                "Validation loss",
                format_loss(validation),
                f"at step {run.series('val_loss').steps[-1]}"
                if validation is not None
                else "never evaluated (train.eval_interval)",
            ),
            ("Tokens", format_count(run.tokens), "trained on"),
            ("Tokens per second", format_count(run.median("tokens_per_second")), "median step"),
            (
                "TFLOPS",
                format_number(run.median("tflops_realised")),
                f"realised; ideal {format_number(run.median('tflops_ideal'))}; median step",
            ),
            ("Parameters", format_count(total), "total"),
            (
                "Activated, gate counted",
                format_count(parameters.get("activated_gate_counted")),
                share("activated_gate_counted"),
            ),
            (
                "Activated, neurons only",
                format_count(parameters.get("activated_neurons_only")),
                share("activated_neurons_only"),
            ),
        ]
    )


def _loss(page: Page, run: Run, *, live: bool) -> None:
    loss = run.series("loss")
    curves = [
        Curve(loss, "train", color=0, kind="faint"),
        Curve(loss.smoothed(), "train, smoothed", color=0),
    ]
    if run.has("val_loss"):
        curves.append(Curve(run.series("val_loss"), "validation", color=1, kind="points"))
    page.chart(
        "Loss",
        curves,
        note="Nats per token. Drag to zoom in, double-click to zoom out; so in every curve.",
        height=380,
        wide=True,
    )
    if live:
        return
    # matplotlib takes a second to import, which no training is to lose for each page of a run.
    from mone_megatron.report.plots import loss_figure, png_data_uri

    page.raw(
        f'<noscript><img class="static" alt="loss" src="{png_data_uri(loss_figure(run))}">'
        "</noscript>"
    )


def _line(
    page: Page,
    run: Run,
    key: str,
    title: str,
    color: int,
    note: str = "",
    alerts: Sequence[AlertSpan] = (),
) -> None:
    """Appends a card with one metric: raw behind, smoothed in front, alerts about it marked."""
    if not run.has(key):
        return
    series = run.series(key)
    page.chart(
        title,
        [
            Curve(series, "each step", color, kind="faint"),
            Curve(series.smoothed(), "smoothed", color),
        ],
        note=note,
        marks=_marks(key, alerts),
    )


def _marks(metric: str, alerts: Sequence[AlertSpan]) -> list[tuple[int, str]]:
    """Returns where alerts about a metric begin and end, one mark a step."""
    kind, parts = _MARKED.get(metric, ("", ()))
    steps: dict[int, list[str]] = {}
    for alert in alerts:
        if alert.kind == kind and alert.part in parts:
            steps.setdefault(alert.begin, []).append(f"begins: {_where(alert)}")
            if alert.end is not None:
                steps.setdefault(alert.end, []).append(f"ends: {_where(alert)}")
    return [
        (step, f"step {step}: {kind} " + "; ".join(texts[:3]) + (" ..." if texts[3:] else ""))
        for step, texts in sorted(steps.items())
    ]


def _where(alert: AlertSpan) -> str:
    expert = f", expert {alert.expert}" if alert.expert is not None else ""
    part = "" if alert.part == "routed" else f", {alert.part}"
    return f"layer {alert.layer}{part}{expert if alert.part in ('routed', 'router') else ''}"


def _alerts(page: Page, run: Run, alerts: Sequence[AlertSpan] | None) -> None:
    page.heading(
        "Alerts",
        "Experts and neurons that stopped working as they should (logging.alerts), judged every "
        f"{run.setting('logging.layer_interval')} steps.",
    )
    if alerts is None:
        page.note("Not looked for: logging.layer_interval is 0, or an earlier version ran this.")
        return
    if run.setting("logging.alerts.enabled") is False:
        page.note("Not looked for: logging.alerts.enabled is false.")
        return
    if not alerts:
        page.note("None.")
        return
    page.table(
        ("kind", "where", "began", "ended", "value", "threshold", "what"),
        [
            (
                alert.kind,
                _where(alert),
                f"step {alert.begin}",
                ABSENT if alert.end is None else f"step {alert.end}",
                format_number(alert.value),
                format_number(alert.threshold),
                # "kind: where: what": the first two have columns of their own.
                alert.message.split(": ", 2)[-1],
            )
            for alert in alerts
        ],
        wrap=True,
    )


def _balance(page: Page, run: Run, alerts: Sequence[AlertSpan]) -> None:
    keys = sorted(key for key in run.columns if _BALANCE_LOSS.fullmatch(key))
    page.heading("Balance losses")
    if not keys:
        page.note("None recorded: the model has no balance loss (model.router.balance).")
        return
    page.open_grid()
    for color, key in enumerate(keys):
        title = _BALANCE_TITLES.get(key, key)
        _line(page, run, key, title, color, note=key, alerts=alerts)
    page.close_grid()


def _tasks(page: Page, run: Run) -> None:
    """Appends tasks during training (train.eval_tasks): each metric with its standard error."""
    keys = [
        key for key in run.columns if key.startswith(_TASK_PREFIX) and not key.endswith(_STDERR)
    ]
    if not keys:
        return
    page.heading("Tasks", "Bands: one standard error to both sides.")
    page.open_grid()
    for color, key in enumerate(sorted(keys)):
        series, low, high = run.series(key), None, None
        if run.has(key + _STDERR):
            error = run.series(key + _STDERR).on(series.steps).values
            low, high = series.values - error, series.values + error
        name = key.removeprefix(_TASK_PREFIX)
        page.chart(name, [Curve(series, name, color, low=low, high=high)])
    page.close_grid()


def _optimisation(page: Page, run: Run) -> None:
    page.heading("Optimisation and speed")
    page.open_grid()
    _line(page, run, "grad_norm", "Gradient norm", 3, "before clipping")
    if run.has("lr"):
        page.chart("Learning rate", [Curve(run.series("lr"), color=2)], zero=True)
    _line(page, run, "tokens_per_second", "Tokens per second", 5)
    rates = [
        Curve(run.series(key), name, color)
        for key, name, color in (
            ("tflops_realised", "realised", 6),
            ("tflops_ideal", "ideal (kept neurons only)", 4),
        )
        if run.has(key)
    ]
    if rates:
        page.chart("TFLOPS", rates, zero=True)
    _line(page, run, "step_seconds", "Seconds per step", 7)
    page.close_grid()


def _layer_line(
    page: Page,
    run: Run,
    metric: str,
    title: str,
    color: int,
    note: str,
    alerts: Sequence[AlertSpan],
) -> None:
    """Appends the mean over layers as a line, with a band from the lowest to the highest layer."""
    grid = run.layer_grid(metric)
    finite = np.isfinite(grid.values)
    some = finite.any(axis=0)
    low = np.where(finite, grid.values, np.inf).min(axis=0)
    high = np.where(finite, grid.values, -np.inf).max(axis=0)
    counts = np.maximum(finite.sum(axis=0), 1)
    mean = np.where(finite, grid.values, 0.0).sum(axis=0) / counts
    many = len(grid.layers) > 1
    page.chart(
        title,
        [
            Curve(
                Series(grid.steps, np.where(some, mean, np.nan)),
                "mean over layers" if many else f"layer {grid.layers[0]}",
                color,
                low=np.where(some, low, np.nan) if many else None,
                high=np.where(some, high, np.nan) if many else None,
            )
        ],
        note=_join(note, "band: lowest to highest layer" if many else ""),
        zero=metric in _FROM_ZERO,
        marks=_marks(metric, alerts),
    )


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _experts(page: Page, run: Run, alerts: Sequence[AlertSpan]) -> None:
    page.heading("Experts", "Tokens each routed expert received, by layer.")
    grids = [entry for entry in _EXPERT_GRIDS if entry[0] in run.layer_metrics]
    if not grids:
        page.note(_why_absent(run, needs_experts=True))
        return
    page.open_grid()
    lines = [
        Curve(run.series(f"{_TOKENS_PER_EXPERT}_{which}"), which, color)
        for color, which in enumerate(("min", "mean", "max", "std"))
        if run.has(f"{_TOKENS_PER_EXPERT}_{which}")
    ]
    if lines:
        page.chart("Tokens per expert", lines, note="mean over layers", zero=True)
    for metric, title, note in grids:
        if metric in ("router/dead_experts", "router/load_entropy"):
            _layer_line(page, run, metric, title, 1, note, alerts)
    for metric, title, note in grids:
        page.heatmap(f"{title}, layer by step", run.layer_grid(metric), note=note)
    page.close_grid()
    _last_panel(page, run)


def _last_panel(page: Page, run: Run) -> None:
    """Appends every expert at the last panel step, and what it cost to know."""
    last = read_last_panel(run.path)
    if last is None or not last.grids:
        return
    cost, step = run.median("panel_seconds"), run.median("step_seconds")
    interval = run.setting("logging.layer_interval")
    told = ""
    if cost is not None and step and interval:
        told = (
            f" These statistics took {format_number(cost)} s each time (median), "
            f"{cost / interval / step:.2%} of the steps at this interval."
        )
    page.note(f"Each expert at step {last.step}; panel.jsonl has every {interval} steps.{told}")
    page.open_grid()
    for name, title, note in _LAST_GRIDS:
        if name in last.grids:
            page.heatmap(title, last.grids[name], note=note, columns="expert")
    page.close_grid()


def _neurons(page: Page, run: Run, alerts: Sequence[AlertSpan]) -> None:
    page.heading("Neurons", "How evenly the neurons inside the experts are kept, by layer.")
    if not run.setting("mone.enabled"):
        page.note("MoNE is off in this run (mone.enabled=false): every neuron is always used.")
        return
    grids = [entry for entry in _NEURON_GRIDS if entry[0] in run.layer_metrics]
    if not grids:
        page.note(_why_absent(run, needs_experts=False))
        return
    page.open_grid()
    for color, (metric, title, note) in enumerate(grids):
        _layer_line(page, run, metric, title, color, note, alerts)
        page.heatmap(f"{title}, layer by step", run.layer_grid(metric), note=note)
    page.close_grid()


def _why_absent(run: Run, needs_experts: bool) -> str:
    if needs_experts and run.setting("model.num_experts") == 0:
        return "The model is dense (model.num_experts=0): there are no experts to show."
    interval = run.setting("logging.layer_interval")
    if interval == 0:
        return "Not recorded: logging.layer_interval is 0."
    return f"Not recorded: the run stopped before step {interval} (logging.layer_interval)."


def _setup(page: Page, run: Run) -> None:
    summary = run.summary
    page.heading("Setup")
    rows = [
        ("status", summary.status),
        ("hardware", summary.hardware),
        ("device", summary.device),
        ("processes", summary.world_size),
        ("seed", run.seed),
        ("data fingerprint", summary.data_fingerprint),
        ("vocabulary", summary.vocab_size),
        *((f"{name} (version)", version) for name, version in summary.versions.items()),
        *(
            (f"FLOPs per step, {name}", format_count(value))
            for name, value in summary.flops_per_step.items()
        ),
        *(
            (f"FLOPs per step, {name}, measured", format_count(value))
            for name, value in summary.measured_flops_per_step.items()
        ),
        *(
            (f"parameters, {name.replace('_', ' ')}", f"{value:,}")
            for name, value in summary.parameters.items()
        ),
        *(
            (f"parameters, {name.replace('_', ' ')}, measured", f"{value:,}")
            for name, value in summary.measured_parameters.items()
        ),
    ]
    page.table(
        ("what", "value"),
        [(key, ABSENT if value is None else str(value)) for key, value in rows],
        wrap=True,
    )
    page.details(
        "Resolved configuration (config.yaml)",
        yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True),
    )
