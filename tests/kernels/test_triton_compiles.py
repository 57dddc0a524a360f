"""The Triton kernels compile for GPUs, by Triton's own compiler, without one.

The interpreter runs Python; only the compiler sees types that change in a branch, or registers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mone_megatron.methods.scores import SCORES

pytest.importorskip("triton", reason="Triton is not installed")

FUSED_SCORES = [score.name for score in SCORES if score.fused is not None]
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


# Machine instructions a row for an H100, as counted when this was written, by kernel, dtype and f.
COUNTED = {
    ("forward, sums", "bf16", 128): 366,
    ("forward, sums", "bf16", 176): 587,
    ("forward, sums", "bf16", 704): 1549,
    ("backward, sums", "bf16", 704): 2296,
    ("mask", "bf16", 704): 794,
    ("forward, sums", "fp32", 1024): 4133,
}
TOLERATED = 1.05
# Times the memory bound, by the model of lab/benchmarks/registers.py.
MOST = 2.0


def test_the_training_kernels_issue_no_more_instructions_than_they_did(tmp_path: Path) -> None:
    found = {}
    for dtype in ("bf16", "fp32"):
        path = tmp_path / f"{dtype}.json"
        widths = sorted({str(f) for _, kind, f in COUNTED if kind == dtype}, key=int)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "mone_megatron.lab.benchmarks.registers", "--training"),
                *("--dtype", dtype, "--output", str(path), "--neurons", *widths),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr
        for kernel in json.loads(path.read_text())["result"]:
            found[kernel["kernel"], dtype, kernel["neurons"]] = kernel
    assert not [kernel for kernel in found.values() if kernel["spilled"]]
    # Every score that the kernels have ranks in the training variant, too.
    assert {name for name, _, _ in found} >= {f"forward, sums, {name}" for name in FUSED_SCORES}
    slow = {
        (name, dtype, neurons): kernel["issue_ratio"]
        for (name, dtype, neurons), kernel in found.items()
        if (name.startswith("forward") or (name, dtype) == ("mask", "bf16"))
        and kernel["issue_ratio"] > MOST
    }
    assert not slow
    grown = {
        key: found[key]["instructions"]
        for key, counted in COUNTED.items()
        if found[key]["instructions"] > counted * TOLERATED
    }
    assert not grown


# Calls of the gated unit, whose kernels are not run: Triton is asked which variant each would be.
VARIANTS = """
import json, sys
import torch
from mone_megatron.kernels import fused
from mone_megatron.kernels.reference import Packed, TopK, WeightSums
from mone_megatron.testing.fake_cuda.launches import variant

launched = {}
class Asked:
    def __init__(self, name, kernel): self.name, self.kernel = name, kernel
    def __getitem__(self, grid):
        def launch(*args, **named):
            launched.setdefault(variant(self.kernel, *args, **named), []).append(self.name)
        return launch
for name, kernel in list(vars(fused).items()):
    if hasattr(kernel, "device_caches"):
        setattr(fused, name, Asked(name, kernel))
fused.scores_equal_torch = lambda *args: True

def new_variants(dtype, neurons, width, expected):
    dtype = getattr(torch, dtype)
    launched.clear()
    fused.expect_rows(expected or None)
    rows_seen = {}
    for rows in (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 48, 64, 77, 128, 255, 1024, 1025, 1056, 3000):
        before = len(launched)
        for packed in (None, Packed(width)):
            gate_up = torch.zeros(rows, 2 * neurons, dtype=dtype, requires_grad=True)
            gate, up = gate_up.chunk(2, dim=-1)
            scale = torch.zeros(rows, requires_grad=True)
            segment = torch.zeros(rows, dtype=torch.int64)
            sums = WeightSums(segment, 3, "selected", True, in_order=True)
            hidden, weights, _ = fused.fused_glu(gate, up, scale, TopK(width, "abs_activation"),
                activate=torch.nn.functional.silu, packed=packed, sums=sums)
            (hidden.sum() + weights.sum()).backward()
            if packed is not None:
                packed.rebuild()
            fused.topk_mask(gate, width)
        if len(launched) > before:
            rows_seen[rows] = len(launched) - before
    return rows_seen

print(json.dumps([new_variants(*case) for case in json.loads(sys.argv[1])]))
"""
USUAL = [("bfloat16", 1408, 352), ("bfloat16", 64, 19), ("bfloat16", 72, 1), ("float32", 96, 33)]


@pytest.fixture(scope="module")
def variants_by_rows() -> list[dict[str, int]]:
    """How many new variants calls of each number of rows need, where they need any: of each case
    with 4096 rows expected, and of one with no number. One process imports Triton for all.
    """
    cases = [*((*case, 4096) for case in USUAL), ("bfloat16", 64, 16, 0)]
    done = subprocess.run(
        [sys.executable, "-c", VARIANTS, json.dumps(cases)],
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", range(len(USUAL)), ids=[f"{d}-{n}-{w}" for d, n, w in USUAL])
def test_no_number_of_rows_makes_another_kernel(
    variants_by_rows: list[dict[str, int]], case: int
) -> None:
    """A rank with few rows, one, or an odd number would compile while all others wait for it."""
    # Nothing to launch but the addition of no sums, then everything at once.
    assert list(variants_by_rows[case]) == ["0", "1"]


def test_how_many_rows_are_usual_does(variants_by_rows: list[dict[str, int]]) -> None:
    assert len(variants_by_rows[-1]) > 2


def test_what_was_compiled_keeps_what_the_reference_does() -> None:
    """The PTX runs, for widths with lanes beyond the end, odd and unaligned ones."""
    script = Path(__file__).with_name("run_compiled.py")
    done = subprocess.run(
        [sys.executable, str(script), "33", "128", "176", "704"],
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


def test_the_training_kernels_compile_for_blackwell() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mone_megatron.lab.benchmarks.registers", "--training"),
            *("--neurons", "128", "--architecture", "100"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [match for line in done.stdout.splitlines() if (match := LINE.match(line))]
    assert len(found) == 4 + len(FUSED_SCORES)
    assert {match["spilled"] for match in found} == {"0"}


@pytest.mark.parametrize("numerator", ["gate", "one"])
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_division_without_its_test_is_the_same_in_bf16(numerator: str, off: int) -> None:
    """For every bf16 gate that takes it, whatever the last bit of the approximate inverse is.

    The steps of triton_activations.near_quotient; sums of products are rounded once, as by a GPU
    (products of fp32 numbers are exact in fp64, and the sums here nearly so).
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(torch.bfloat16).float()
    gate = gate[gate.abs() < 80]
    assert len(gate) > 30000

    def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (a.double() * b.double() + c.double()).float()

    above = gate if numerator == "gate" else torch.ones_like(gate)
    below = 1.0 + torch.exp(-gate)
    inverse = (1.0 / below).view(torch.int32).add(off).view(torch.float32)
    one = torch.ones_like(gate)
    inverse = fused_multiply_add(inverse, fused_multiply_add(-below, inverse, one), inverse)
    quotient = above * inverse
    quotient = fused_multiply_add(inverse, fused_multiply_add(-below, quotient, above), quotient)
    exact = above / below
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(quotient[normal].bfloat16(), exact[normal].bfloat16())
    assert (quotient.view(torch.int32) - exact.view(torch.int32))[normal].abs().max() <= 1


@pytest.mark.parametrize(("neurons", "scale"), [(704, 1.0), (1024, 0.3), (1024, 3.0), (2048, 1.0)])
def test_rows_are_searched_everywhere_and_tie_no_more_often_than_the_counts_have_it(
    neurons: int, scale: float
) -> None:
    """Rows of Gaussian gates, a quarter kept; the search of triton_select on the host."""
    from mone_megatron.lab.benchmarks.registers import EXPECTED_TIES

    generator = torch.Generator().manual_seed(1)
    gates = (torch.randn(100, neurons, generator=generator) * scale).bfloat16()
    keys = torch.nn.functional.silu(gates).abs().view(torch.int16).int()
    k, ties = neurons // 4, 0
    for row in keys:
        kth = max(int(row.max()) - 1023, 0)
        reached = int((row >= kth).sum())
        assert reached >= k, "found only by the search everywhere"
        for bit in range(9, -1, -1):
            counted = int((row >= kth + (1 << bit)).sum())
            if counted >= k:
                kth, reached = kth + (1 << bit), counted
        ties += reached > k
    assert ties / 100 <= EXPECTED_TIES["bf16"] + 0.2


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


@pytest.mark.parametrize(
    ("dtype", "neurons", "score", "words"),
    [
        (torch.float32, 64, "abs_gate", None),
        (torch.float32, 64, "abs_activation", "mone.score=abs_activation: torch computes the scor"),
        (torch.float32, 64, "abs_product", "mone.score=abs_product: torch computes the scores"),
        (torch.float32, 8192, "signed_gate", None),
        (torch.float32, 16384, "signed_gate", "model.expert_ffn_hidden_size: rows of 16384 neuro"),
        (torch.bfloat16, 32768, "abs_gate", "model.expert_ffn_hidden_size: rows of 32768 neurons"),
    ],
)
def test_what_is_left_to_torch_is_said_with_its_key(
    dtype: torch.dtype, neurons: int, score: str, words: str | None
) -> None:
    from mone_megatron.kernels import fused
    from mone_megatron.kernels.reference import TopK

    gate = torch.zeros(1, neurons, dtype=dtype)
    line = fused.left_to_torch(gate, gate, TopK(1, score), torch.nn.functional.silu)
    assert (line is None) is (words is None)
    assert (line or "").startswith(words or "")
    assert fused.left_to_torch(gate, gate, None, torch.nn.functional.gelu) == (
        "model.activation: it has no form in Triton, so torch computes the gated units"
    )
