"""The Triton kernels compile for GPUs, by Triton's own compiler, without one.

The interpreter runs Python; only the compiler sees types that change in a branch, or registers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

LINE = re.compile(r"^(?P<kernel>.{36}) (?P<dtype>\w+) f=\d+ .* (?P<spilled>\d+) bytes spilled")


def test_all_kernels_compile_and_fit_in_registers() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mone_megatron.lab.benchmarks.registers", "--variants"),
            *("--neurons", "1024", "--dtype", "bf16", "fp32"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [match for line in done.stdout.splitlines() if (match := LINE.match(line))]
    assert len(found) == 2 * 13 + 7
    spilling = [match.group() for match in found if match["spilled"] != "0"]
    assert not spilling
