"""Compiles the Triton kernels for a GPU that need not be there; counts what they take of it.

``python -m mone_megatron.lab.benchmarks.registers`` prints one line a kernel: registers, spills,
machine instructions and barriers a row, and how long those take beside the memory traffic of the
row. The compiler, ptxas and the disassembler come with Triton; this is how launch shapes were
chosen without a GPU, and how the tests know that the kernels compile and get no slower, which the
interpreter does not tell.

**The times are a model, not measurements.** Memory: the bytes of a row that have to be read and
written, over the published bandwidth. Instructions: those of :mod:`.sass`, over all schedulers of
all multiprocessors, each of which issues one a cycle; nothing waits for memory, for a result or for
another warp. A search turns, a row has ties, and an expert has rows as often as below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from mone_megatron.command_line import Parser
from mone_megatron.kernels import (
    fused_decode,
    triton_decode,
    triton_glu,
    triton_scores,
    triton_select,
)
from mone_megatron.kernels.fused import fused_score, launch_shape, selecting_shape
from mone_megatron.kernels.triton_activations import RELU, RELU2, SIGMOID, SILU
from mone_megatron.lab.benchmarks import result_files, sass
from mone_megatron.methods.scores import SCORES
from mone_megatron.planning.hardware import GPUS

_REGISTERS_OF_A_MULTIPROCESSOR = 65536
_WARPS_OF_A_MULTIPROCESSOR = 64
_PROGRAMS = 32
# An H100 (SXM): multiprocessors, schedulers of each, cycles a second under load.
_MULTIPROCESSORS, _SCHEDULERS, _CLOCK = 132, 4, 1.755e9
_BANDWIDTH = GPUS["H100"].memory_bandwidth
# Arguments that are multiples of 16 elements or bytes for common widths.
_ALIGNED = (
    "neurons", "gate_stride", "up_stride", "scores_stride", "grad_stride", "hidden_size",
    "expert_stride", "neuron_stride",
)  # fmt: skip
_NUMBERS = ("rows", "k", "packed_width", "grad_hidden_stride", *_ALIGNED)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Rows of a program of the balance sums; of an expert, after which sums are written.
_ROWS, _ROWS_OF_AN_EXPERT = 16, 512
# How often a search in fp32 turns (in bf16 it has no loop), and in how many rows scores tie at the
# threshold: SiLU of Gaussian gates keeps 1/4. In bf16 no such row is searched everywhere
# (test_triton_compiles.py draws them).
EXPECTED_PASSES = {"bf16": 15.0, "fp32": 18.0}
EXPECTED_TIES = {"bf16": 0.6, "fp32": 0.01}
_KEEP_RATIO = 0.25


@dataclass(frozen=True)
class Resources:
    """Holds what one compiled kernel takes of a GPU.

    Attributes:
        kernel: its name and variant.
        neurons: f, the width of a row.
        dtype: of gate and up projections.
        warps: of one program.
        registers: of a thread.
        spilled: bytes a thread that did not fit in registers.
        instructions: issued for a row, by all warps of its program; expected (:mod:`.sass`).
        barriers: for a row.
        bytes_moved: between the GPU's memory and the kernel for a row.
        issue_ratio: time to issue the instructions over time to move the bytes.
        unit_ratio: the same for the busiest unit.
    """

    kernel: str
    neurons: int
    dtype: str
    warps: int
    registers: int
    spilled: int
    instructions: float
    barriers: float
    bytes_moved: float
    issue_ratio: float
    unit_ratio: float

    @property
    def resident(self) -> int:
        """Returns how many programs a multiprocessor of an H100 holds at a time."""
        by_registers = _REGISTERS_OF_A_MULTIPROCESSOR // (self.registers * 32 * self.warps)
        return min(by_registers, _WARPS_OF_A_MULTIPROCESSOR // self.warps, _PROGRAMS)

    def __str__(self) -> str:
        return (
            f"{self.kernel:<36} {self.dtype} f={self.neurons:<5} {self.warps:>2} warps, "
            f"{self.registers:>3} registers, {self.spilled:>4} bytes spilled, "
            f"{self.resident:>2} programs a multiprocessor, "
            f"{self.instructions:>8,.0f} instructions and {self.barriers:>3.0f} barriers a row, "
            f"{self.issue_ratio:.2f} times the memory bound ({self.unit_ratio:.2f} by the busiest "
            "unit)"
        )


def slots_of_memory_bound(bytes_moved: float) -> float:
    """Returns how many instructions could be issued while so many bytes move."""
    return bytes_moved / _BANDWIDTH * _MULTIPROCESSORS * _SCHEDULERS * _CLOCK


def compiled_kernel(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    neurons: int,
    architecture: int,
    warps: int,
    aligned: bool = True,
) -> CompiledKernel:
    """Compiles a kernel for rows of a width, and returns what Triton made of it.

    Args:
        kernel: a kernel of ours.
        pointers: element types of the tensors it is given; others are None.
        constants: values of its constants, but of ``NEURONS`` and ``BLOCK``.
        neurons: f, the width of a row.
        architecture: 90 for an H100.
        warps: of a program.
        aligned: whether strides are multiples of 16, and tensors begin at multiples of 16 bytes.
    """
    constants = {"BLOCK": launch_shape(neurons).block, "NEURONS": neurons, **constants}
    numbers = {number: "i32" for number in _NUMBERS if number in kernel.arg_names}
    types = {key: f"*{kind}" for key, kind in pointers.items()} | numbers
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    values = {key: constants.get(key) for key in kernel.arg_names if key not in types}
    multiples = {
        (kernel.arg_names.index(key),): [["tt.divisibility", 16]]
        for key in types
        if aligned and (key in pointers or key in _ALIGNED)
    }
    return triton.compile(
        ASTSource(kernel, signature, values, multiples),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
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
    bytes_moved: float,
    warps: int,
    rows: int = 1,
    turns: Mapping[str, float] | None = None,
) -> Resources:
    compiled = compiled_kernel(
        kernel, pointers, constants, neurons=neurons, architecture=architecture, warps=warps
    )
    cubin = compiled.asm["cubin"]
    told = sass.tool("cuobjdump", ["--dump-resource-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    counts = sass.counted(
        sass.tool("nvdisasm", ["-c", "-g"], cubin),
        warps=warps,
        rows=rows,
        turns={kernel.fn.__name__: rows, "bisect": EXPECTED_PASSES[dtype], **(turns or {})},
        shares={
            "without_last": EXPECTED_TIES[dtype],
            "far_quotient": 0.0,
            "search_everywhere": 0.0,
            # In bf16 only that calls it.
            **({"bisect": 0.0} if dtype == "bf16" else {}),
        },
        shares_of_turns={"leave_sums": 1 / _ROWS_OF_AN_EXPERT},
    )
    slots = slots_of_memory_bound(bytes_moved)
    return Resources(
        name,
        neurons,
        dtype,
        warps,
        int(found[1]),
        int(found[2]),
        counts.instructions,
        counts.barriers,
        bytes_moved,
        counts.instructions / slots,
        counts.busiest / slots,
    )


def _size(dtype: str) -> int:
    return _DTYPES[dtype].itemsize


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
    constants = {
        "ROWS": _ROWS if sums else 1,
        "ACTIVATION": SILU.value,
        "KEEP": "top",
        "SCORE": None if dtype == "fp32" else triton_scores.weight_score,
        "SIGNED": False,
        "NARROW": dtype == "bf16",
        "WEIGHTS": "selected",
        "NORMALIZE": sums,
    } | (more_constants or {})
    given = {"scores": dtype} if constants["SCORE"] is None and constants["KEEP"] == "top" else {}
    pointers = {"gate": dtype, "up": dtype, "scale": "fp32", "hidden": dtype, "bits": "u8", **given}
    size, bits = _size(dtype), neurons / 8
    bytes_moved = (3 + len(given)) * neurons * size + bits + 4
    if packed:
        pointers |= {"packed_gate": dtype, "packed_up": dtype}
        bytes_moved += 2 * _KEEP_RATIO * neurons * size
    if sums:
        pointers |= {"segment": "i64", "share": "fp32"}
        pointers |= {"weight_slots": "fp32", "count_slots": "i32"}
        bytes_moved += 12 + 8 * neurons / _ROWS
    if "mask" in (more_pointers or {}):
        bytes_moved += neurons
    return _compile(
        name or "forward" + ", sums" * sums + ", packed" * packed,
        triton_glu.forward_kernel,
        pointers | (more_pointers or {}),
        constants,
        neurons=neurons,
        dtype=dtype,
        architecture=architecture,
        bytes_moved=bytes_moved,
        warps=selecting_shape(neurons, _DTYPES[dtype], most=packed and sums).warps,
        rows=constants["ROWS"],
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


def scores(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles the training variant for every score that the kernels have, but the default's."""
    return [
        forward(
            neurons,
            dtype,
            sums=True,
            packed=False,
            architecture=architecture,
            name=f"forward, sums, {score.name}",
            more_constants={"SCORE": fused_score(score.name), "SIGNED": score.signed},
        )
        for score in SCORES
        if score.fused is not None and (dtype == "bf16" or not score.reads_activation)
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
    read = 3 if not packed else 1 + 2 * _KEEP_RATIO
    return _compile(
        "backward" + ", sums" * sums + ", packed" * packed,
        triton_glu.backward_kernel,
        pointers,
        constants,
        neurons=neurons,
        dtype=dtype,
        architecture=architecture,
        # The gradients of the sums of one segment serve many rows.
        bytes_moved=(read + 2) * neurons * _size(dtype) + neurons / 8 + 8 + 12 * sums,
        warps=launch_shape(neurons, 16 if packed else 8).warps,
    )


def others(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles the mask alone, hidden values rebuilt, and the addition of sums."""
    common: dict[str, Any] = {"neurons": neurons, "dtype": dtype, "architecture": architecture}
    size, slots = _size(dtype), 16
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
            bytes_moved=neurons * (size + 1),
            warps=selecting_shape(neurons, _DTYPES[dtype]).warps,
            **common,
        ),
        _compile(
            "rebuild",
            triton_glu.rebuild_kernel,
            rebuilt,
            {"ACTIVATION": SILU.value},
            bytes_moved=neurons * (size * (1 + 2 * _KEEP_RATIO) + 1 / 8) + 4,
            warps=launch_shape(neurons).warps,
            **common,
        ),
        _compile(
            f"addition of {slots} slots, 128 neurons",
            triton_glu.segment_sums,
            added,
            {"ROWS": _ROWS, "SLOTS": slots, "BLOCK": 128},
            bytes_moved=128 * 8 * (slots + 1),
            warps=4,
            turns={"segment_sums": 1},
            **common,
        ),
    ]


def decoding(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles the kernels for few tokens, with a hidden size of 2048.

    A row is what one program computes: rows of weights, or the choice of one token and expert.
    """
    hidden, kept_neurons = 2048, int(neurons * _KEEP_RATIO)
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
    size = _size(dtype)
    products: dict[str, Any] = {
        "warps": fused_decode.DOT_WARPS,
        "bytes_moved": fused_decode.DOT_ROWS * hidden * size,
        "turns": {"_dot_rows": hidden / fused_decode.DOT_BLOCK},
    }
    each = kept_neurons / fused_decode.PARTS
    return [
        _compile(
            "decoding: gate",
            triton_decode.project_kernel,
            rows | slots | {"values": dtype},
            dot,
            **products,
            **common,
        ),
        _compile(
            "decoding: choice",
            triton_decode.choose_kernel,
            {"gate": dtype, "scale": dtype} | given | kept,
            rule,
            warps=selecting_shape(neurons, _DTYPES[dtype]).warps,
            bytes_moved=neurons * size * (1 + len(given)) + 8 * kept_neurons + size,
            **common,
        ),
        _compile(
            "decoding: up",
            triton_decode.up_kernel,
            rows | slots | kept,
            dot,
            **products,
            **common,
        ),
        _compile(
            "decoding: down",
            triton_decode.down_kernel,
            {"weight": dtype, "expert": "i64", "order": "i64", "output": "fp32"} | kept,
            added,
            warps=fused_decode.SUM_WARPS,
            bytes_moved=fused_decode.SUM_BLOCK * (each * size + 4),
            turns={"down_kernel": each / fused_decode.SUM_ROWS},
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


def training(neurons: int, dtype: str, *, architecture: int) -> list[Resources]:
    """Compiles what a training step with the balance loss runs, and the mask alone."""
    settings: dict[str, Any] = {"packed": False, "architecture": architecture}
    return [
        forward(neurons, dtype, sums=False, **settings),
        forward(neurons, dtype, sums=True, **settings),
        backward(neurons, dtype, sums=True, **settings),
        others(neurons, dtype, architecture=architecture)[0],
        *scores(neurons, dtype, architecture=architecture),
    ]


def main() -> None:
    """Prints the table."""
    parser = Parser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--neurons", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--dtype", nargs="+", choices=tuple(_DTYPES), default=["bf16"])
    parser.add_argument("--architecture", type=int, default=90, help="90 is H100 (default)")
    parser.add_argument("--variants", action="store_true", help="other scores and modes, too")
    parser.add_argument(
        "--training", action="store_true", help="only what training runs, with every fused score"
    )
    parser.add_argument("--output", type=Path, help="also write JSON here")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    print(f"triton {triton.__version__}, sm_{options.architecture}; times are a model of an H100")
    results = []
    for dtype in options.dtype:
        for neurons in options.neurons:
            compiled = training if options.training else all_of
            for resources in compiled(neurons, dtype, architecture=options.architecture):
                print(resources, flush=True)
                results.append(resources)
    if options.variants:
        for resources in variants(options.neurons[0], architecture=options.architecture):
            print(resources, flush=True)
            results.append(resources)
    if options.output is not None:
        model = {
            "multiprocessors": _MULTIPROCESSORS,
            "schedulers": _SCHEDULERS,
            "clock": _CLOCK,
            "bandwidth": _BANDWIDTH,
            "rows_of_a_program": _ROWS,
            "rows_of_an_expert": _ROWS_OF_AN_EXPERT,
            "passes": EXPECTED_PASSES,
            "rows_with_ties": EXPECTED_TIES,
        }
        facts = {
            "versions": result_files.versions(),
            "architecture": options.architecture,
            "model": model,
        }
        result_files.write_json(options.output, "registers", facts, results)


if __name__ == "__main__":
    main()
