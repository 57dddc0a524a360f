"""The bar on a real terminal, at several widths, and the lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
import time
from dataclasses import replace

import pytest

from mone_megatron.config.load import compose
from mone_megatron.methods.hook import Record
from mone_megatron.train.hooks.console import ConsoleHook, describe

CONFIG = compose(["experiment=quickstart_mone"])
STEPS = CONFIG.train.steps


def record(step: int) -> Record:
    """What a step of quickstart_mone shows."""
    return {
        "step": step,
        "loss": 5.1234,
        "grad_norm": 1.234,
        "lr": 2e-3,
        "router/load_balancing_loss": 1.01,
        "mone/balance_loss": 1.02,
        "tokens_per_second": 12345.6,
        "tflops_realised": 0.0123,
    }


def on_a_terminal(columns: int, steps: range) -> list[str]:
    """Everything that the bar ever was, from a pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        hook = ConsoleHook(CONFIG, stream)
        hook.on_start()
        for step in steps:
            hook.on_step(record(step))
            time.sleep(0.15)
        hook.on_end("completed")
        stream.flush()
        shown = os.read(master, 1 << 20).decode()
    os.close(master)
    return [line for line in re.split(r"[\r\n]+", shown) if line.strip()]


@pytest.mark.parametrize("columns", [80, 100, 130, 200])
def test_the_bar_keeps_what_matters_at_every_width(columns: int) -> None:
    last = on_a_terminal(columns, range(1, 4))[-1]
    assert len(last) <= columns
    assert f" 3/{STEPS} " in last
    assert re.search(r" \d+:\d\d left, loss 5\.1234 ", last)
    assert "tok/s 12,346" in last
    assert ("12.3 GFLOPS" in last) == (columns >= 200)


def test_the_bar_of_a_resumed_run_begins_where_it_goes_on() -> None:
    shown = on_a_terminal(100, range(101, 104))
    assert f" 103/{STEPS} " in shown[-1]
    # Some 0.15 s a step, whatever the first 100 took.
    minutes, seconds = re.search(r" (\d+):(\d\d) left", shown[-1]).groups()  # type: ignore[union-attr]
    assert 2 <= 60 * int(minutes) + int(seconds) <= 1200


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_keep_ratio_is_shown_while_it_falls(columns: int) -> None:
    stream = io.StringIO()
    hook = ConsoleHook(replace(CONFIG, logging=replace(CONFIG.logging, progress="lines")), stream)
    hook.on_start_record({"step": 0, "tokens": 0, "val_loss": 6.25, "mone/keep_ratio": 1.0})
    assert stream.getvalue() == f"step   0/{STEPS} | val 6.2500 | keep 1.000\n"
    line = describe(record(1) | {"mone/keep_ratio": 0.75}, columns - 36)
    assert line.startswith("loss 5.1234 | keep 0.750")
    assert ("tok/s" in line) == (columns > 60)


def test_lines_tell_the_time_left_once_it_is_known() -> None:
    stream = io.StringIO()
    hook = ConsoleHook(replace(CONFIG, logging=replace(CONFIG.logging, progress="lines")), stream)
    hook.on_start()
    for step in (101, 102):
        hook.on_step(record(step))
    first, second = stream.getvalue().splitlines()
    assert first == f"step 101/{STEPS} | {describe(record(101))}"
    assert re.search(r"12\.3 GFLOPS \| 0:\d\d left$", second)


def test_a_speed_is_told_in_a_unit_that_can_be_read() -> None:
    assert describe({"tflops_realised": 412.4}) == "412 TFLOPS"
    assert describe({"tflops_realised": 0.00831}) == "8.31 GFLOPS"
