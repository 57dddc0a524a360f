"""The terminal: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from mone_megatron.config.schema import Config
from mone_megatron.methods.hook import Hook, Record


def _flops(tflops: float) -> str:
    """Returns floating-point operations a second in a unit in which they can be read."""
    return f"{tflops:.3g} TFLOPS" if tflops >= 0.1 else f"{tflops * 1000:.3g} GFLOPS"


# What is shown of a record, in this order: key -> text of its value.
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "val_loss": "val {:.4f}".format,
    "router/load_balancing_loss": "expert balance {:.3f}".format,
    "router/seq_load_balancing_loss": "seq balance {:.3f}".format,
    "router/global_load_balancing_loss": "global balance {:.3f}".format,
    "router/z_loss": "z {:.3f}".format,
    "mone/balance_loss": "neuron balance {:.3f}".format,
    "experts/sparsity_loss": "sparsity {:.3f}".format,
    "mone/keep_ratio": "keep {:.3f}".format,
    "grad_norm": "grad {:.2f}".format,
    "lr": "lr {:.1e}".format,
    "tokens_per_second": "tok/s {:,.0f}".format,
    "tflops_realised": _flops,
}
# Where not everything has room: what has, the first of these first.
# There is a keep ratio while it changes only, and then it says what the loss is of.
_WANTED = ("loss", "val_loss", "mone/keep_ratio", "tokens_per_second", "grad_norm", "lr")


def format_duration(seconds: float) -> str:
    """Returns ``1:02:03`` or ``2:03``."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(record: Record, columns: int | None = None) -> str:
    """Returns a record as one line: ``loss 4.1234 | grad 1.02 | ...``.

    Args:
        record: of a step.
        columns: that the line may take, as long as it shows the loss; None for any number.
    """
    texts = {key: text(record[key]) for key, text in _SHOWN.items() if key in record}
    if columns is not None:
        kept: list[str] = []
        for key in sorted(texts, key=lambda key: (*_WANTED, key).index(key)):
            line = " | ".join(texts[name] for name in (*kept, key))
            if kept and len(line) > columns:
                break
            kept.append(key)
        texts = {key: text for key, text in texts.items() if key in kept}
    return " | ".join(texts.values())


# Characters of the bar itself.
_BAR = 12


def _columns(stream: TextIO) -> int | None:
    """Returns the width of a terminal; None where it is not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


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
        # The first step of this process, and when it was done.
        self.first: tuple[int, float] | None = None

    def on_start(self) -> None:
        """Opens the bar."""
        if self.style == "bar":
            self.bar = tqdm(
                total=self.steps,
                desc=self.name,
                file=self.stream,
                dynamic_ncols=True,
                bar_format=f"{{desc}} {{n}}/{{total}} {{bar:{_BAR}}} {{remaining}} left{{postfix}}",
            )

    def on_start_record(self, record: Record) -> None:
        """Shows the record of step 0; how long it took says nothing about steps."""
        if self.bar is not None:
            self.bar.set_postfix_str(describe(record, self._room(0)))
        elif self.style == "lines":
            self._print(0, record)

    def on_step(self, record: Record) -> None:
        """Moves the bar or prints a line."""
        step = int(record["step"])
        if self.bar is not None:
            self._move_bar(step, record)
        elif self.style == "lines" and (step % self.interval == 0 or step == self.steps):
            self._print(step, record)
        if self.first is None:
            # It takes longer than the others: what comes after it is what the rest will take.
            self.first = step, time.perf_counter()

    def _print(self, step: int, record: Record) -> None:
        width = len(str(self.steps))
        parts = [f"step {step:>{width}}/{self.steps}", describe(record)]
        if (left := self._seconds_left(step)) is not None:
            parts.append(f"{format_duration(left)} left")
        print(" | ".join(parts), file=self.stream, flush=True)

    def _room(self, step: int) -> int | None:
        """Returns the columns that the bar leaves for a record; None where that is not known."""
        columns = _columns(self.stream)
        taken = len(f"{self.name}:  {step}/{self.steps}  0:00:00 left, ") + _BAR
        return None if columns is None else columns - taken

    def _seconds_left(self, step: int) -> float | None:
        """Returns how long the steps after this one will take; None where that is not known."""
        if self.first is None or step <= self.first[0]:
            return None
        first, done = self.first
        return (time.perf_counter() - done) / (step - first) * (self.steps - step)

    def _move_bar(self, step: int, record: Record) -> None:
        if self.first is None:
            # A resumed run does not begin with step 1, and the first one tells no speed.
            self.bar.initial = self.bar.n = self.bar.last_print_n = step
            self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.set_postfix_str(describe(record, self._room(step)), refresh=False)
        if self.first is None:
            self.bar.refresh()
        else:
            self.bar.update(step - self.bar.n)

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
