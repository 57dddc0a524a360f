"""Weights & Biases: records and alerts are sent by a thread of its own."""

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

from mone_megatron.config.convert import flatten
from mone_megatron.config.schema import Config
from mone_megatron.helpers import HelperError, HelperThread
from mone_megatron.methods.hook import Hook, Record
from mone_megatron.train.health.alerts import Alert

# W&B drops alerts that come too often.
_SECONDS_BETWEEN_ALERTS = 60.0
_ALERTS_IN_MESSAGE = 20


class WandbHook(Hook):
    """Logs to Weights & Biases through its own package; offline unless asked otherwise.

    A thread of its own does all of it, so that a server that refuses, fails or stalls neither stops
    nor slows training. What cannot be sent stays in ``metrics.jsonl``, and in ``wandb/`` for
    ``wandb sync`` where W&B could write it.
    """

    def __init__(
        self, config: Config, folder: Path, run_id: str, stream: TextIO | None = None
    ) -> None:
        """Logs into ``folder``/wandb; a resumed run has the id of the one it goes on with."""
        self.config = config
        self.folder = folder
        self.run_id = run_id
        self.stream = sys.stderr if stream is None else stream
        # Records and alerts, then the exit code.
        self.queue: queue.SimpleQueue[Record | tuple[Alert, ...] | int] = queue.SimpleQueue()
        self.thread = HelperThread(self._work, name="wandb", on_failure=self._warn)
        self.warned = False

    def on_start(self) -> None:
        """Opens the W&B run, in the background."""
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

    def on_start_record(self, record: Record) -> None:
        """Sends the record of step 0, in the background."""
        self.queue.put(dict(record))

    def on_step(self, record: Record) -> None:
        """Sends the record, in the background."""
        step = int(record["step"])
        due = step % self.config.logging.interval == 0 or step == self.config.train.steps
        if due or "panel_seconds" in record:
            self.queue.put(dict(record))

    def on_alerts(self, alerts: Sequence[Alert]) -> None:
        """Sends alerts, in the background, several in one message."""
        self.queue.put(tuple(alerts))

    def on_end(self, status: str) -> None:
        """Closes the W&B run; anything but completion is marked as failed."""
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
        """Returns a W&B run; offline when the server does not answer in time."""
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
    """Sends all of ``alerts`` as one message of W&B's."""
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
