"""Compiles selecting kernels and runs their PTX (:mod:`ptx_warp`); compares masks with torch's.

A process of its own, since the tests run kernels in Triton's interpreter: ``python run_compiled.py
WIDTH ...`` prints how many rows were compared, and fails at the first that differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from ptx_warp import Memory, Warp
from torch import Tensor

from mone_megatron.kernels import triton_glu, triton_scores, triton_select
from mone_megatron.kernels.fused import selecting_shape
from mone_megatron.kernels.reference import topk_mask
from mone_megatron.kernels.triton_activations import RELU
from mone_megatron.lab.benchmarks.registers import compiled_kernel

KIND = torch.bfloat16


def rows_of(neurons: int) -> Iterator[Tensor]:
    """Yields rows of bf16 scores: usual ones, ties, both zeros, far apart, infinite, NaN."""
    generator = torch.Generator().manual_seed(neurons)

    def drawn(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (neurons,), generator=generator)]

    yield torch.randn(neurons, generator=generator)
    yield -torch.randn(neurons, generator=generator).abs()
    yield drawn([0.0, -0.0, 0.5, -0.5])
    yield drawn([1.0, 2.0**-30, 2.0**-60, 2.0**-130, 0.0, -(2.0**-100), -8.0, 3.3e38])
    yield drawn([float("inf"), -float("inf"), -1.0, 1e-20])
    yield drawn([1.0] * 200 + [float("nan"), -float("nan")])


def array(tensor: Tensor) -> np.ndarray:
    """Returns the bits of bf16 numbers."""
    return tensor.to(KIND).view(torch.int16).numpy()


def masks_alone(neurons: int, *, aligned: bool) -> int:
    """Compares the mask kernel's rows."""
    warps = selecting_shape(neurons, KIND).warps
    kernel = compiled_kernel(
        triton_select.topk_mask_kernel,
        {"scores": "bf16", "mask": "i8"},
        {"NARROW": True},
        neurons=neurons, architecture=90, warps=warps, aligned=aligned,
    )  # fmt: skip
    scores = torch.stack(list(rows_of(neurons))).to(KIND)
    compared = 0
    for k in sorted({1, neurons // 4, neurons - 1}):
        memory = Memory()
        stride = neurons if aligned else neurons + 1
        at = memory.put(array(torch.nn.functional.pad(scores, (0, stride - neurons))))
        mask = memory.put(np.full(scores.shape, 7, np.int8))
        warp = Warp(kernel.asm["ptx"], memory, kernel.metadata.shared)
        for row in range(len(scores)):
            warp.run(row, [at, mask, k, stride])
        found = torch.from_numpy(memory.get(mask, tuple(scores.shape), np.int8).copy())
        assert torch.equal(found.bool(), topk_mask(scores, k)), ("mask", neurons, k, aligned)
        compared += len(scores)
    return compared


def masks_of_training(neurons: int, *, signed: bool) -> int:
    """Compares the bits, values and counts of the forward kernel with sums."""
    warps = selecting_shape(neurons, KIND).warps
    pointers = {"gate": "bf16", "up": "bf16", "scale": "fp32", "hidden": "bf16", "bits": "u8",
                "segment": "i64", "share": "fp32", "weight_slots": "fp32",
                "count_slots": "i32"}  # fmt: skip
    kernel = compiled_kernel(
        triton_glu.forward_kernel,
        pointers,
        {"ROWS": 4, "ACTIVATION": RELU.value, "KEEP": "top", "SCORE": triton_scores.gate_score,
         "SIGNED": signed, "NARROW": True, "WEIGHTS": "selected", "NORMALIZE": True},
        neurons=neurons, architecture=90, warps=warps,
    )  # fmt: skip
    gate = torch.stack(list(rows_of(neurons))).to(KIND)
    up, rows, k = torch.randn(gate.shape).to(KIND), len(gate), neurons // 4
    segment = torch.tensor([0, 0, 1, 1, 1, 1])
    memory = Memory()
    at = {
        "gate": memory.put(array(gate)), "up": memory.put(array(up)),
        "scale": memory.put(np.full(rows, 0.5, np.float32)),
        "hidden": memory.put(array(up)),
        "bits": memory.put(np.zeros((rows, -(-neurons // 8)), np.uint8)),
        "segment": memory.put(segment.numpy()),
        "share": memory.put(np.zeros(rows, np.float32)),
        "weight_slots": memory.put(np.zeros((4, neurons), np.float32)),
        "count_slots": memory.put(np.zeros((4, neurons), np.int32)),
    }  # fmt: skip
    numbers = {"rows": rows, "k": k, "packed_width": 0, "gate_stride": neurons,
               "up_stride": neurons, "scores_stride": 0}  # fmt: skip
    given = [at.get(name, numbers.get(name)) for name in triton_glu.forward_kernel.arg_names]
    warp = Warp(kernel.asm["ptx"], memory, kernel.metadata.shared)
    for program in range(2):
        warp.run(program, [value for value in given if value is not None])
    expected = topk_mask(gate if signed else gate.abs(), k)
    bits = memory.get(at["bits"], (rows, -(-neurons // 8)), np.uint8)
    found = torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little")[:, :neurons].copy())
    assert torch.equal(found.bool(), expected), ("forward", neurons, signed)
    # Programs and segments: rows 0 and 1, 2 and 3; 4 and 5, at slot 1 + 1.
    counts = memory.get(at["count_slots"], (4, neurons), np.int32)
    by_slot = [expected[:2].sum(0), expected[2:4].sum(0), expected[4:].sum(0)]
    assert all(np.array_equal(counts[slot], sums) for slot, sums in enumerate(by_slot))
    hidden = torch.from_numpy(memory.get(at["hidden"], tuple(gate.shape), np.int16).copy())
    value = (torch.relu(gate.float()) * up.float() * expected * 0.5).to(KIND)
    torch.testing.assert_close(hidden.view(KIND), value, rtol=0, atol=0, equal_nan=True)
    return rows


def main() -> None:
    """Compares every width of the command line."""
    compared = 0
    for neurons in map(int, sys.argv[1:]):
        for aligned in {neurons % 16 == 0, False}:
            compared += masks_alone(neurons, aligned=aligned)
        if neurons % 16 == 0:
            compared += sum(masks_of_training(neurons, signed=signed) for signed in (False, True))
    print(compared)


if __name__ == "__main__":
    main()
