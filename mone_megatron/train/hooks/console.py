"""The terminal: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record

# Shown on the terminal when present, in this order: (key, label, format).
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("val_loss", "val", ".4f"),
    ("router/load_balancing_loss", "expert balance", ".3f"),
    ("router/seq_load_balancing_loss", "seq balance", ".3f"),
    ("router/global_load_balancing_loss", "global balance", ".3f"),
    ("router/z_loss", "z", ".3f"),
    ("mone/balance_loss", "neuron balance", ".3f"),
    ("experts/sparsity_loss", "sparsity", ".3f"),
    ("grad_norm", "grad", ".2f"),
    ("lr", "lr", ".1e"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("tflops_realised", "TFLOPS", ".3g"),
)


def format_duration(seconds: float) -> str:
    """Returns ``1:02:03`` or ``2:03``."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(record: Record) -> str:
    """Returns a record as one line: ``loss 4.1234 | grad 1.02 | ...``."""
    return " | ".join(
        f"{label} {record[key]:{spec}}" for key, label, spec in _SHOWN if key in record
    )


class ConsoleHook(Hook):
    """Draws a bar on a terminal, and lines elsewhere: losses, tokens/s, TFLOPS, time left."""

    def __init__(self, config: Config, stream: TextIO | None = None) -> None:
        """Chooses between bar, lines and nothing, on ``stream`` (standard error)."""
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
        """Opens the bar."""
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
        """Moves the bar or prints a line."""
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
        """Says it, in every style."""
        done = "not applied" if action == "skip" else "rolling back"
        print(f"WARNING: step {step}: {fault}: {done}", file=self.stream, flush=True)

    def on_rollback(self, step: int) -> None:
        """Moves the bar back."""
        if self.bar is not None:
            self.bar.n = step

    def on_end(self, status: str) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
