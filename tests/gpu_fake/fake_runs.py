"""Runs of :mod:`mone_megatron.testing.fake_cuda.step`, and questions to what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mone_megatron.testing.fake_cuda.findings import Finding

# One microbatch a rank of the smallest model: how often a step waits depends on neither.
SMALL = ("train.global_batch_size=8", "train.micro_batch_size=1", "model.num_layers=2")


@dataclass(frozen=True)
class FakeRun:
    """What one run on the fake device found."""

    written: dict[str, Any]
    # What it said, as a run on GPUs would.
    said: str

    def found(self, *phases: str, kind: str) -> list[Finding]:
        """Returns the findings of a kind, each as often as it was found; of all phases for none."""
        return [
            Finding(**{key: line[key] for key in ("kind", "what", "place", "ours")})
            for phase, lines in self.written["found"].items()
            if not phases or phase in phases
            for line in lines
            if line["kind"] == kind
            for _ in range(line["count"])
        ]

    @property
    def dispatches(self) -> int:
        """Returns how many times a step without recomputation sends tokens to experts."""
        return int(self.written["moe_layers"] * self.written["microbatches"])

    def launches(self, kernel: str) -> int:
        """Returns how many times all steps launch a kernel."""
        lines = self.written["launches"].items()
        return sum(count for line, count in lines if line.startswith(f"{kernel} "))


@cache
def fake_run(folder: Path, world: int, *overrides: str) -> FakeRun:
    """Returns what rank 0 of ``world`` finds; each configuration runs once for each folder."""
    path = folder / f"{abs(hash((world, overrides)))}.json"
    command = [sys.executable, "-m", "mone_megatron.testing.fake_cuda.step", "0", str(world)]
    done = subprocess.run(
        [*command, *overrides, "--json", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return FakeRun(json.loads(path.read_text(encoding="utf-8")), done.stderr)
