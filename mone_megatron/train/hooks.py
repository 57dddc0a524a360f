"""The hooks of a run: terminal, metrics.jsonl, run.json, W&B and the report. Rank 0 only."""

from __future__ import annotations

import math
import os
import queue
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from mone_megatron.config.load import flatten
from mone_megatron.config.schema import Config
from mone_megatron.display import lost
from mone_megatron.helpers import HelperError, HelperThread
from mone_megatron.os_errors import naming
from mone_megatron.report.plots import write_loss_plot
from mone_megatron.report.run_page import write_report
from mone_megatron.train.alerts import Alert
from mone_megatron.train.loop import Hook, Record
from mone_megatron.train.panel_hook import PanelHook
from mone_megatron.train.profiling import ProfileHook
from mone_megatron.train.run_directory import (
    keep_metrics_up_to,
    to_json_line,
    write_json,
)
from mone_megatron.train.showing import ShowingHook

# Shown on the terminal when present, in this order: (key, label, format).
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("val_loss", "val", ".4f"),
    ("router/load_balancing_loss", "expert balance", ".3f"),
    ("router/seq_load_balancing_loss", "seq balance", ".3f"),
    ("router/global_load_balancing_loss", "global balance", ".3f"),
    ("router/z_loss", "z", ".3f"),
    ("mone/balance_loss", "neuron balance", ".3f"),
    ("grad_norm", "grad", ".2f"),
    ("lr", "lr", ".1e"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("tflops_realised", "TFLOPS", ".3g"),
)


# W&B drops alerts that come too often.
_SECONDS_BETWEEN_ALERTS = 60.0
_ALERTS_IN_MESSAGE = 20


def format_duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(record: Record) -> str:
    """A record as one line: ``loss 4.1234 | grad 1.02 | ...``."""
    return " | ".join(
        f"{label} {record[key]:{spec}}" for key, label, spec in _SHOWN if key in record
    )


class ConsoleHook(Hook):
    """A bar on a terminal, lines elsewhere: step, losses, tokens/s, TFLOPS, time left."""

    def __init__(self, config: Config, stream: TextIO | None = None) -> None:
        """Choose between bar, lines and nothing, on ``stream`` (standard error)."""
        stream = sys.stderr if stream is None else stream
        style = config.logging.progress
        if style == "auto":
            style = "bar" if stream.isatty() else "lines"
        self.style = style
        self.name = config.run.name
        self.steps = config.train.steps
        self.interval = config.logging.interval
        self.stream = stream
        self.bar: Any = None
        self.started = 0.0

    def on_start(self) -> None:
        """Open the bar."""
        self.started = time.perf_counter()
        if self.style == "bar":
            self.bar = tqdm(
                total=self.steps,
                desc=self.name,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {n}/{total} {bar:12} {postfix} | {remaining} left",
            )

    def on_step(self, record: Record) -> None:
        """Move the bar or print a line."""
        step = int(record["step"])
        if self.bar is not None:
            self.bar.set_postfix_str(describe(record), refresh=False)
            self.bar.update()
        elif self.style == "lines" and (step % self.interval == 0 or step == self.steps):
            left = (time.perf_counter() - self.started) / step * (self.steps - step)
            width = len(str(self.steps))
            line = f"step {step:>{width}}/{self.steps} | {describe(record)}"
            print(f"{line} | {format_duration(left)} left", file=self.stream, flush=True)

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Say it, in every style."""
        done = "not applied" if action == "skip" else "rolling back"
        print(f"WARNING: step {step}: {fault}: {done}", file=self.stream, flush=True)

    def on_rollback(self, step: int) -> None:
        """Move the bar back."""
        if self.bar is not None:
            self.bar.n = step

    def on_end(self, status: str) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class MetricsFileHook(Hook):
    """``metrics.jsonl``: one JSON object a step, on disk as soon as the step is done."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``."""
        self.path = folder / "metrics.jsonl"

    def on_start(self) -> None:
        """Open the file; a resumed run goes on with it."""
        self.file = self.path.open("a", encoding="utf-8", buffering=1)

    def on_step(self, record: Record) -> None:
        """Append the record."""
        with naming(self.path):
            self.file.write(to_json_line(record))

    def on_rollback(self, step: int) -> None:
        """Drop the records that will come anew."""
        self.file.close()
        keep_metrics_up_to(self.path, step)
        self.on_start()

    def on_end(self, status: str) -> None:
        """Close the file."""
        self.file.close()


class RunFileHook(Hook):
    """``run.json``: what ran, on what, and how it ended."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Start from ``facts``: what is known before the first step, and how far a resumed run is
        (``steps``, ``tokens``, ``seconds``)."""
        self.path = folder / "run.json"
        self.facts = facts | {"status": "running"}
        self.missed: set[str] = set()

    def on_start(self) -> None:
        """Write what is known."""
        write_json(self.path, self.facts)

    def on_step(self, record: Record) -> None:
        """Remember how far it came."""
        self.facts["steps"] = int(record["step"])
        self.facts["tokens"] = int(record["tokens"])
        self.facts["seconds"] += record["step_seconds"]
        self._note_streams()

    def note(self, what: str, why: str) -> None:
        """Add to ``not_shown``, on disk at once: what the run could not show, and why.

        Each is noted the first time only. A note that cannot be written is let go.
        """
        if what in self.missed:
            return
        self.missed.add(what)
        missed = self.facts.setdefault("not_shown", [])
        missed.append({"what": what, "why": why, "step": self.facts["steps"]})
        with suppress(OSError):
            write_json(self.path, self.facts)

    def _note_streams(self) -> None:
        for stream, why in lost().items():
            self.note(stream, why)

    def on_fault(self, step: int, fault: str, action: str) -> None:
        """Count and name it."""
        self.facts.setdefault("faults", []).append({"step": step, "why": fault, "action": action})

    def on_end(self, status: str) -> None:
        """Write how it ended."""
        self.facts["status"] = status
        self._note_streams()
        write_json(self.path, self.facts)


class WandbHook(Hook):
    """Weights & Biases through its own package; offline unless asked otherwise.

    A thread of its own does all of it, so that a server that refuses, fails or stalls neither stops
    nor slows training. What cannot be sent stays in ``metrics.jsonl``, and in ``wandb/`` for
    ``wandb sync`` where W&B could write it.
    """

    def __init__(
        self, config: Config, folder: Path, run_id: str, stream: TextIO | None = None
    ) -> None:
        """Log into ``folder``/wandb; a resumed run has the id of the one it goes on with."""
        self.config = config
        self.folder = folder
        self.run_id = run_id
        self.stream = sys.stderr if stream is None else stream
        # Records and alerts, then the exit code.
        self.queue: queue.SimpleQueue[Record | tuple[Alert, ...] | int] = queue.SimpleQueue()
        self.thread = HelperThread(self._work, name="wandb", on_failure=self._warn)
        self.warned = False

    def on_start(self) -> None:
        """Open the W&B run, in the background."""
        # W&B's only switch for reporting its own errors, which holds up the end of the process for
        # 20 seconds when its servers do not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # The service of a process that started this one (a notebook, a sweep) would outlive a run
        # that fails to start, and take the offline one, of the same id, for it: all of it is lost.
        os.environ.pop("WANDB_SERVICE", None)
        try:
            self.thread.start()
        except HelperError as error:
            self._warn(str(error))

    def on_step(self, record: Record) -> None:
        """Send the record, in the background."""
        step = int(record["step"])
        due = step % self.config.logging.interval == 0 or step == self.config.train.steps
        if due or "panel_seconds" in record:
            self.queue.put(dict(record))

    def on_alerts(self, alerts: Sequence[Alert]) -> None:
        """Send alerts, in the background, several in one message."""
        self.queue.put(tuple(alerts))

    def on_end(self, status: str) -> None:
        """Close the W&B run; anything but completion is marked as failed."""
        self.queue.put(0 if status == "completed" else 1)
        # The start, possibly twice, and the end; each has its own limit.
        if self.thread.ident is not None:
            self.thread.join(3 * self.config.logging.wandb.timeout_seconds)
        if self.thread.is_alive():
            self._warn("it does not end")

    def _work(self) -> None:
        try:
            run = self._open()
            # W&B's own count of records only goes up; ours goes back when a run is resumed.
            run.define_metric("*", step_metric="step")
            waiting: list[Alert] = []
            sent = -math.inf
            while not isinstance(item := self.queue.get(), int):
                if isinstance(item, tuple):
                    waiting += item
                else:
                    run.log(item)
                if waiting and time.monotonic() - sent >= _SECONDS_BETWEEN_ALERTS:
                    _alert(run, waiting)
                    waiting, sent = [], time.monotonic()
            if waiting:
                _alert(run, waiting)
            run.finish(exit_code=item)
        # Whatever goes wrong in another company's client or server is not the training's problem.
        except Exception as error:
            self._warn(str(error))
            # What W&B does at the end of the process fails by a traceback when its service is gone.
            with suppress(Exception):
                import wandb

                wandb.teardown()

    def _open(self) -> Any:
        """A W&B run; offline when the server does not answer in time."""
        import wandb

        settings = self.config.logging.wandb

        def start(mode: str) -> Any:
            return wandb.init(
                mode=mode,
                project=settings.project,
                entity=settings.entity or None,
                group=settings.group or None,
                tags=list(settings.tags) or None,
                id=self.run_id,
                # Offline, `wandb sync --append` joins the parts by their id.
                resume="allow" if mode == "online" else None,
                name=self.config.run.name,
                dir=str(self.folder),
                config=flatten(self.config),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=settings.timeout_seconds,
                    finish_timeout=settings.timeout_seconds,
                ),
            )

        if settings.mode == "online":
            try:
                return start("online")
            except Exception as error:  # as in _work
                self._warn(f"{error}; going on offline")
                # W&B's service would go on with the run that failed, whose id is the same.
                wandb.teardown()
        return start("offline")

    def _warn(self, why: str) -> None:
        if not self.warned:
            self.warned = True
            told = " ".join(why.split())
            print(
                f"WARNING: W&B: {told}; training goes on, {self.folder / 'metrics.jsonl'} has "
                "everything",
                file=self.stream,
                flush=True,
            )


def _alert(run: Any, alerts: Sequence[Alert]) -> None:
    """One message of W&B's with all of ``alerts``."""
    import wandb

    begun = sum(alert.event == "begin" for alert in alerts)
    lines = [f"step {alert.step}: {alert.message}" for alert in alerts[:_ALERTS_IN_MESSAGE]]
    if len(alerts) > len(lines):
        lines.append(f"and {len(alerts) - len(lines)} more: see the run's alerts.jsonl")
    run.alert(
        title=f"experts and neurons: {begun} begun, {len(alerts) - begun} over",
        text="\n".join(lines),
        level=wandb.AlertLevel.WARN if begun else wandb.AlertLevel.INFO,
        # They are collected here; W&B would drop those of the same title.
        wait_duration=0,
    )


class ReportHook(Hook):
    """``loss.png`` and ``report.html`` at the end, also of an interrupted run."""

    def __init__(self, folder: Path) -> None:
        """Report on ``folder``."""
        self.folder = folder
        self.steps = 0

    def on_step(self, record: Record) -> None:
        """There is something to draw."""
        self.steps += 1

    def on_end(self, status: str) -> None:
        """Draw."""
        if self.steps:
            write_loss_plot(self.folder)
            page = write_report(self.folder)
            print(f"report: {page}", file=sys.stderr, flush=True)


def build_hooks(
    config: Config, folder: Path, facts: dict[str, Any], device: torch.device
) -> list[Hook]:
    """The hooks of rank 0. They end in reverse, so the report comes last: it reads the others'."""
    run_file = RunFileHook(folder, facts)
    hooks: list[Hook] = []
    if config.logging.report:
        hooks.append(ShowingHook(ReportHook(folder), "report.html or loss.png", run_file.note))
    tell = None
    if config.logging.wandb.mode != "disabled":
        hooks.append(wandb := WandbHook(config, folder, facts["id"]))
        tell = wandb.on_alerts
    if config.logging.layer_interval:
        hooks.append(PanelHook(config, folder, step=facts["steps"], tell=tell))
    if config.train.profile:
        profile = ProfileHook(folder, config.train.profile, device)
        hooks.append(ShowingHook(profile, "the profile", run_file.note))
    console = ShowingHook(ConsoleHook(config), "progress", run_file.note)
    return [*hooks, run_file, MetricsFileHook(folder), console]
