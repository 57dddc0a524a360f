"""Times how long a process takes to the end of its first training step."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.helpers import HelperError, ending, starting

_FIRST_STEP = re.compile(r"step +1/")


@dataclass(frozen=True)
class FirstStep:
    """Holds the seconds from a process's start to the end of its first step."""

    clock: float
    processor: float


def start_trainer(overrides: Sequence[str]) -> FirstStep:
    """Runs the trainer until its first step is shown, and ends it.

    Args:
        overrides: of the configuration, of one process; its data is there already.

    Raises:
        HelperError: it ended before.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mone_megatron.pretrain", *overrides]
        command += [f"run.dir={folder}/run", "logging.wandb.mode=disabled", "logging.report=false"]
        command += ["logging.progress=lines", "logging.interval=1"]
        began = time.perf_counter()
        with starting("a training process"):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        assert process.stderr is not None
        last = ""
        try:
            for line in process.stderr:
                if _FIRST_STEP.search(line):
                    clock = time.perf_counter() - began
                    return FirstStep(clock, _processor_seconds(process.pid))
                last = line.strip() or last
        finally:
            process.kill()
            process.stderr.close()
            process.wait()
    raise HelperError(f"the trainer {ending(process.returncode)} before its first step: {last}")


def _processor_seconds(pid: int) -> float:
    """Returns the processor time of a process so far; NaN where there is no /proc."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return float("nan")
