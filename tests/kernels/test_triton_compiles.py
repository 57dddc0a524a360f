"""The Triton kernels compile for GPUs, by Triton's own compiler, without one.

The interpreter runs Python; only the compiler sees types that change in a branch, or registers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

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


def test_no_argument_that_changes_from_call_to_call_makes_another_kernel() -> None:
    """Triton compiles again for a number that is 1 or stops being a multiple of 16."""
    code = """
import json
from mone_megatron.kernels import triton_glu, triton_select
kernels = [triton_glu.forward_kernel, triton_glu.backward_kernel, triton_glu.rebuild_kernel,
           triton_glu.segment_sums, triton_select.topk_mask_kernel]
print(json.dumps([p.name for kernel in kernels for p in kernel.params
                  if p.name in ("rows", "k", "packed_width") and not p.do_not_specialize]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("usual", [1, 2048, 65536, 10**7])
def test_the_rows_of_a_program_are_those_of_the_usual_call(
    monkeypatch: pytest.MonkeyPatch, usual: int
) -> None:
    from mone_megatron.kernels import fused
    from mone_megatron.kernels.reference import WeightSums

    def rows_each(rows: int) -> int:
        segment_T = torch.zeros(rows, dtype=torch.int64)
        sums = WeightSums(segment_T, 1, "selected", True, in_order=True)
        slots = fused._Slots(torch.zeros(rows, 32), sums)
        assert len(slots.weights) * slots.rows_each >= rows
        return slots.rows_each

    monkeypatch.setattr(fused, "_expected_rows", None)
    assert len({rows_each(rows) for rows in (1, 3000, 70000)}) > 1
    fused.expect_rows(usual)
    assert len({rows_each(rows) for rows in (1, 3000, 70000)}) == 1


@pytest.mark.parametrize(
    ("dtype", "neurons", "known"),
    [
        (torch.bfloat16, 16384, True),
        (torch.bfloat16, 16385, False),
        (torch.float32, 8192, True),
        (torch.float32, 8193, False),
        (torch.float64, 64, False),
    ],
)
def test_rows_that_would_spill_are_left_to_torch(
    dtype: torch.dtype, neurons: int, known: bool
) -> None:
    from mone_megatron.kernels import fused

    gate = torch.zeros(1, neurons, dtype=dtype)
    assert fused.supports(gate, gate, torch.nn.functional.silu) is known
