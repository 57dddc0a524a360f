"""The panel's files and alerts: ``panel.jsonl``, ``alerts.jsonl``, the terminal. Rank 0 only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook
from mone_megatron.os_errors import naming
from mone_megatron.train.health.alerts import Alert, AlertMonitor
from mone_megatron.train.panel import Panel
from mone_megatron.train.run_directory import keep_records_up_to

# Alerts of one step that the terminal shows; all are in alerts.jsonl.
_SHOWN = 4


class PanelFilesHook(Hook):
    """Writes every panel, judges it, and tells what begins and ends.

    ``alerts.jsonl`` follows from ``panel.jsonl`` and ``logging.alerts``: a run that is resumed or
    rolled back judges the panels it keeps once more, in silence, and goes on from there.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        step: int,
        tell: Callable[[Sequence[Alert]], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Writes into ``folder``.

        Args:
            config: the run's.
            folder: run.dir.
            step: where the run goes on from; later panels in the files are dropped.
            tell: is given the alerts of each step that has any.
            stream: the terminal; None for standard error.
        """
        self.config = config
        self.folder = folder
        self.path = folder / "panel.jsonl"
        self.step = step
        self.tell = tell
        self.stream = sys.stderr if stream is None else stream

    def on_start(self) -> None:
        """Opens the files; a resumed run goes on with them."""
        self._take_up(self.step)

    def add(self, panel: Panel) -> None:
        """Appends it, and tells what it begins and ends."""
        with naming(self.path):
            self.file.write(panel.to_json_line())
        if self.monitor is None:
            return
        alerts = self.monitor.update(panel)
        with naming(self.folder / "alerts.jsonl"):
            self.alerts_file.writelines(map(_line, alerts))
        for alert in alerts[:_SHOWN]:
            print(f"ALERT step {alert.step}: {alert.message}", file=self.stream, flush=True)
        if len(alerts) > _SHOWN:
            rest = f"{len(alerts) - _SHOWN} more: {self.folder / 'alerts.jsonl'}"
            print(f"ALERT step {panel.step}: {rest}", file=self.stream, flush=True)
        if alerts and self.tell is not None:
            self.tell(alerts)

    def on_rollback(self, step: int) -> None:
        """Drops the panels that will come anew, and what they told."""
        self._close()
        self._take_up(step)

    def on_end(self, status: str) -> None:
        """Closes the files."""
        self._close()

    def _take_up(self, step: int) -> None:
        monitor = AlertMonitor(self.config) if self.config.logging.alerts.enabled else None
        alerts: list[Alert] = []
        keep_records_up_to(
            self.path,
            step,
            lambda record: alerts.extend(
                monitor.update(Panel.from_record(record)) if monitor is not None else []
            ),
        )
        self.monitor = monitor
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        alerts_path = self.folder / "alerts.jsonl"
        draft = alerts_path.with_name(alerts_path.name + ".tmp")
        draft.write_text("".join(map(_line, alerts)), encoding="utf-8")
        os.replace(draft, alerts_path)
        self.alerts_file = alerts_path.open("a", encoding="utf-8", buffering=1)

    def _close(self) -> None:
        self.file.close()
        self.alerts_file.close()


def _line(alert: Alert) -> str:
    return json.dumps(asdict(alert)) + "\n"
