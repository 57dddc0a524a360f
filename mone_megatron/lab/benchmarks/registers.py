"""Compiles the Triton kernels for a GPU that need not be there; reports registers and spills.

``python -m mone_megatron.lab.benchmarks.registers`` prints one line a kernel. The compiler, ptxas
included, comes with Triton; this is how launch shapes were chosen without a GPU, and how the tests
know that the kernels compile, which the interpreter does not tell.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mone_megatron.helpers import HelperError, ending, starting
from mone_megatron.kernels import (
    fused_decode,
    triton_decode,
    triton_glu,
    triton_scores,
    triton_select,
)
from mone_megatron.kernels.fused import launch_shape
from mone_megatron.kernels.triton_activations import RELU, RELU2, SIGMOID, SILU

_REGISTERS_OF_A_MULTIPROCESSOR = 65536
_WARPS_OF_A_MULTIPROCESSOR = 64
_PROGRAMS = 32
# Arguments that are multiples of 16 elements or bytes for common widths.
_ALIGNED = (
    "neurons", "gate_stride", "up_stride", "scores_stride", "grad_stride", "hidden_size",
    "expert_stride", "neuron_stride",
)  # fmt: skip
_NUMBERS = ("rows", "k", "packed_width", "grad_hidden_stride", *_ALIGNED)


@dataclass(frozen=True)
class Resources:
    """Holds what one compiled kernel takes of a GPU."""

    kernel: str
    neurons: int
    dtype: str
    warps: int
    registers: int
    # Bytes a thread.
    spilled: int

    @property
    def resident(self) -> int:
        """Returns how many programs a multiprocessor of an H100 holds at a time."""
        by_registers = _REGISTERS_OF_A_MULTIPROCESSOR // (self.registers * 32 * self.warps)
        return min(by_registers, _WARPS_OF_A_MULTIPROCESSOR // self.warps, _PROGRAMS)

    def __str__(self) -> str:
        return (
            f"{self.kernel:<36} {self.dtype} f={self.neurons:<5} {self.warps:>2} warps, "
            f"{self.registers:>3} registers, {self.spilled:>4} bytes spilled, "
            f"{self.resident} programs a multiprocessor"
        )


def _compile(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    neurons: int,
    dtype: str,
    architecture: int,
    num_warps: int | None = None,
) -> Resources:
    block, warps = launch_shape(neurons)
    warps = num_warps or warps
    constants = {"BLOCK": block, **constants}
    numbers = {number: "i32" for number in _NUMBERS if number in kernel.arg_names}
    types = {key: f"*{kind}" for key, kind in pointers.items()} | numbers
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    values = {key: constants.get(key) for key in kernel.arg_names if key not in types}
    aligned = {
        (kernel.arg_names.index(key),): [["tt.divisibility", 16]]
        for key in types
        if key in pointers or key in _ALIGNED
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    registers, spilled = _usage(compiled.asm["cubin"])
    return Resources(name, neurons, dtype, warps, registers, spilled)


def _usage(cubin: bytes) -> tuple[int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        with starting("Triton's cuobjdump"):
            done = subprocess.run(
                [cuobjdump, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=False,
            )
    if done.returncode:
        why = " ".join(done.stderr.split())
        raise HelperError(f"{cuobjdump} {ending(done.returncode)}: {why}")
    told = done.stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


def forward(
    neurons: int,
    dtype: str,
    *,
    sums: bool,
    packed: bool,
    architecture: int,
    name: str | None = None,
    more_pointers: dict[str, str] | None = None,
    more_constants: dict[str, Any] | None = None,
) -> Resources:
    """Compiles the forward kernel.

    By default it selects by |SiLU(g)|, in fp32 by torch's scores.
    """
    given = {"scores": dtype} if dtype == "fp32" else {}
    pointers = {"gate": dtype, "up": dtype, "scale": "fp32", "hidden": dtype, "bits": "u8", **given}
    if packed:
        pointers |= {"packed_gate": dtype, "packed_up": dtype}
    if sums:
        pointers |= {"segment": "i64", "share": "fp32"}
        pointers |= {"weight_slots": "fp32", "count_slots": "i32"}
    constants = {
        "ROWS": 16 if sums else 1,
        "ACTIVATION": SILU.value,
        "KEEP": "top",
        "SCORE": None if given else triton_scores.weight_score,
        "SIGNED": False,
        "NARROW": dtype == "bf16",
        "WEIGHTS": "selected",
        "NORMALIZE": sums,
    }
    return _compile(
        name or "forward" + ", sums" * sums + ", packed" * packed,
        triton_glu.forward_kernel,
        pointers | (more_pointers or {}),
        constants | (more_constants or {}),
        neurons=neurons,
        dtype=dtype,
        architecture=architecture,
    )


# Scores, activations and modes beside the default: extra pointers and constants.
_VARIANTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "forward, |a u|": ({}, {"SCORE": triton_scores.product_score}),
    "forward, sigmoid": ({}, {"ACTIVATION": SIGMOID.value}),
    "forward, |g|, ReLU": (
        {},
        {"SCORE": triton_scores.gate_score, "ACTIVATION": RELU.value},
    ),
    "forward, g, ReLU^2": (
        {},
        {"SCORE": triton_scores.gate_score, "SIGNED": True, "ACTIVATION": RELU2.value},
    ),
    "forward, a given mask": ({"mask": "i8"}, {"KEEP": "mask"}),
    "forward, all kept": ({}, {"KEEP": "all"}),
    "forward, weights of all, any order": ({"order": "i64"}, {"WEIGHTS": "all"}),
}


def variants(neurons: int, *, architecture: int) -> list[Resources]:
    """Compiles the forward kernel of bf16 in its other variants."""
    return [
        forward(
            neurons,
            "bf16",
            sums="order" in pointers,
            packed=False,
            architecture=architecture,
            name=name,
            more_pointers=pointers,
            more_constants=constants,
        )
        for name, (pointers, constants) in _VARIANTS.items()
    ]


def backward(neurons: int, dtype: str, *, sums: bool, packed: bool, architecture: int) -> Resources:
    """Compiles the backward kernel."""
    pointers = dict.fromkeys(("grad_hidden", "gate", "up", "grad_gate", "grad_up"), dtype)
    pointers |= {"scale": "fp32", "grad_scale": "fp32", "bits": "u8"}
    if sums:
        pointers |= {"grad_sum": "fp32", "segment": "i64", "share": "fp32"}
    constants = {
        "SLOPE": SILU.value_and_slope,
        "PACKED": packed,
        "WEIGHTS": "selected",
        "NORMALIZE": sums,
    }
    name = "backward" + ", sums" * sums + ", packed" * packed
    return _compile(
        name,
        triton_glu.backward_kernel,
        pointers,
        constants,
        neurons=neurons,
        dtype=dtype,
        architecture=architecture,
    )


def others(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles the mask alone, hidden values rebuilt, and the addition of sums."""
    common: dict[str, Any] = {"neurons": neurons, "dtype": dtype, "architecture": architecture}
    rebuilt = {
        "packed_gate": dtype, "packed_up": dtype, "scale": "fp32", "bits": "u8", "hidden": dtype,
    }  # fmt: skip
    added = {
        "starts": "i64", "weight_slots": "fp32", "count_slots": "i32", "weight_sum": "fp32",
        "kept": "fp32",
    }  # fmt: skip
    return [
        _compile(
            "mask",
            triton_select.topk_mask_kernel,
            {"scores": dtype, "mask": "i8"},
            {"NARROW": dtype == "bf16"},
            **common,
        ),
        _compile(
            "rebuild", triton_glu.rebuild_kernel, rebuilt, {"ACTIVATION": SILU.value}, **common
        ),
        _compile(
            "addition of sums",
            triton_glu.segment_sums,
            added,
            {"ROWS": 16, "SLOTS": 16, "BLOCK": 128},
            num_warps=4,
            **common,
        ),
    ]


def decoding(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles the kernels for few tokens."""
    common: dict[str, Any] = {"neurons": neurons, "dtype": dtype, "architecture": architecture}
    slots = {"token": "i64", "expert": "i64"}
    dot = {"ROWS": fused_decode.DOT_ROWS, "BLOCK": fused_decode.DOT_BLOCK}
    added = {
        "PARTS": fused_decode.PARTS, "ROWS": fused_decode.SUM_ROWS,
        "BLOCK": fused_decode.SUM_BLOCK,
    }  # fmt: skip
    kept = {"chosen": "i32", "weights": "fp32"}
    given = {"scores": dtype} if dtype == "fp32" else {}
    rule = {
        "ACTIVATION": SILU.value,
        "SCORE": None if given else triton_scores.weight_score,
        "SIGNED": False,
        "NARROW": dtype == "bf16",
    }
    rows = {"tokens": dtype, "weight": dtype}
    return [
        _compile(
            "decoding: gate",
            triton_decode.project_kernel,
            rows | slots | {"values": dtype},
            dot,
            num_warps=fused_decode.DOT_WARPS,
            **common,
        ),
        _compile(
            "decoding: choice",
            triton_decode.choose_kernel,
            {"gate": dtype, "scale": dtype} | given | kept,
            rule,
            **common,
        ),
        _compile(
            "decoding: up",
            triton_decode.up_kernel,
            rows | slots | kept,
            dot,
            num_warps=fused_decode.DOT_WARPS,
            **common,
        ),
        _compile(
            "decoding: down",
            triton_decode.down_kernel,
            {"weight": dtype, "expert": "i64", "order": "i64", "output": "fp32"} | kept,
            added,
            num_warps=fused_decode.SUM_WARPS,
            **common,
        ),
    ]


def all_of(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles every kernel for one width and dtype."""
    results = []
    for sums, packed in ((False, False), (True, False), (True, True)):
        settings: dict[str, Any] = {"sums": sums, "packed": packed, "architecture": architecture}
        results += [forward(neurons, dtype, **settings), backward(neurons, dtype, **settings)]
    results += others(neurons, dtype, architecture=architecture)
    return results + decoding(neurons, dtype, architecture=architecture)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neurons", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--architecture", type=int, default=90, help="90 is H100 (default)")
    parser.add_argument("--variants", action="store_true", help="other scores and modes, too")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    print(f"triton {triton.__version__}, sm_{options.architecture}")
    for dtype in options.dtype:
        for neurons in options.neurons:
            for resources in all_of(neurons, dtype, architecture=options.architecture):
                print(resources, flush=True)
    if options.variants:
        for resources in variants(options.neurons[0], architecture=options.architecture):
            print(resources, flush=True)


if __name__ == "__main__":
    main()
