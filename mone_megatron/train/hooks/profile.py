"""A trace of some steps (``train.profile``): where their time goes, on rank 0."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mone_megatron.config.train import PROFILED_FROM
from mone_megatron.methods.hook import Hook, Record

FOLDER = "profile"
_ROWS = 40


class ProfileHook(Hook):
    """Writes ``profile/trace.json.gz`` (for Perfetto) and ``profile/operations.txt``."""

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        """Traces ``steps`` steps, after those in which memory is first allocated.

        Args:
            folder: of the run.
            steps: how many.
            device: that the run computes on.
        """
        self.folder = folder / FOLDER
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # The step before the first traced one warms the profiler up.
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=PROFILED_FROM - 2, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )
        self.by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self.running = False

    def on_start(self) -> None:
        """Begins to count steps."""
        self.profiler.start()
        self.running = True

    def on_step(self, record: Record) -> None:
        """Counts a step."""
        self.profiler.step()

    def on_end(self, status: str) -> None:
        """Writes what a run that ended early has."""
        if self.running:
            self.profiler.stop()

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self.folder / "trace.json.gz"))
        averages = done.key_averages()
        table = averages.table(
            sort_by=self.by, row_limit=_ROWS, max_name_column_width=60, top_level_events_only=False
        )
        (self.folder / "operations.txt").write_text(table + "\n", encoding="utf-8")
        print(
            f"profile: {self.folder / 'operations.txt'}, and {self.folder / 'trace.json.gz'} for "
            "Perfetto",
            file=sys.stderr,
            flush=True,
        )
