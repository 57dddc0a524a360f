"""Functions compiled for this processor: exact where masks are, and torch where there are none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import (
    attention_cpu,
    compiled_cpu,
    cpu,
    reference,
    rms_norm_cpu,
    rotary_cpu,
    topk_cpu,
)
from mone_megatron.kernels.compiled_cpu import compiled
from mone_megatron.kernels.reference import TopK, WeightSums
from mone_megatron.model.cross_entropy import vocab_parallel_cross_entropy

# Gives a tensor of a shape, of which gradients can be asked.
Random = Callable[..., Tensor]

needs_compiler = pytest.mark.skipif(compiled().library is None, reason=compiled().problem)


def _mask(gate: Tensor, k: int) -> Tensor:
    """Which neurons the compiled function keeps: where hidden values of ones are not zero."""
    rows = len(gate)
    sums = WeightSums(torch.arange(rows), rows)
    _, _, kept = cpu.selected_swiglu(
        gate, torch.ones_like(gate), None, TopK(k, "abs_activation"), sums
    )
    assert kept is not None
    return kept.bool()


# What scores are made of: ties, zeros of both signs, the smallest and the largest, NaN.
ODD = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1.0, -1.0, 1.0000001, 3e38, float("inf"), float("nan")]


@needs_compiler
@given(
    rows=st.integers(1, 12),
    neurons=st.integers(1, 70),
    kind=st.sampled_from(["odd", "levels", "normal", "wide", "equal"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_masks_equal_the_reference(
    rows: int, neurons: int, kind: str, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, neurons))
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, neurons, generator=generator)
    gate = {
        "odd": torch.tensor(ODD)[torch.randint(len(ODD), (rows, neurons), generator=generator)],
        "levels": torch.randint(-2, 3, (rows, neurons), generator=generator).float(),
        "normal": normal,
        "wide": normal * 10.0 ** torch.randint(-30, 20, (rows, neurons), generator=generator),
        "equal": torch.full((rows, neurons), float(seed % 3)),
    }[kind]
    expected = reference.topk_mask(F.silu(gate).abs(), k)
    assert torch.equal(_mask(gate, k), expected)


def _random() -> Random:
    """The same tensors each time that it is called."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).requires_grad_()


def _gated_unit(random: Random) -> list[Tensor]:
    leaves = [random(333, 40), random(333, 40), random(333)]
    segment = torch.arange(333) // 100
    hidden, weights, kept = cpu.selected_swiglu(
        *leaves, TopK(10, "abs_activation"), WeightSums(segment, 4, in_order=True)
    )
    assert weights is not None
    assert kept is not None
    loss = (hidden * random(333, 40)).sum() + weights.square().sum()
    return [hidden, weights, kept, *torch.autograd.grad(loss, leaves)]


def _norm(random: Random) -> list[Tensor]:
    leaves = [random(333, 40), random(40)]
    normed = rms_norm_cpu.rms_norm(*leaves, 1e-5)
    return [normed, *torch.autograd.grad(normed, leaves, random(333, 40))]


def _rotation(random: Random) -> list[Tensor]:
    heads = random(33, 2, 3, 8)
    rotated = rotary_cpu.rotate(heads, random(33, 1, 1, 8).detach())
    return [rotated, *torch.autograd.grad(rotated, [heads], random(33, 2, 3, 8))]


def _attention(random: Random) -> list[Tensor]:
    leaves = [random(200, 2, 6, 16), random(200, 2, 3, 16), random(200, 2, 3, 16)]
    context = attention_cpu.causal_attention(*leaves, scale=0.25)
    return [context, *torch.autograd.grad(context, leaves, random(*context.shape))]


def _losses(random: Random) -> list[Tensor]:
    logits = random(333, 77)
    target = torch.arange(333) % 70
    losses = vocab_parallel_cross_entropy(logits.clone(), target, first=0, valid=75, group=None)
    return [losses, *torch.autograd.grad(losses.sum(), [logits])]


def _experts_of_a_token(random: Random) -> list[Tensor]:
    return list(topk_cpu.topk(random(333, 32).detach(), 4))


@needs_compiler
@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize(
    "function", [_gated_unit, _norm, _rotation, _attention, _losses, _experts_of_a_token]
)
def test_results_do_not_depend_on_threads(
    function: Callable[[Random], list[Tensor]], threads: int
) -> None:
    results: list[list[Tensor]] = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            results.append(function(_random()))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def _said(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from mone_megatron.kernels import compiled_cpu, ops\n" + code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.strip()


_DESCRIBE = "import torch; print(ops.describe(torch.device('cpu')))"


def test_without_a_compiler_torch_computes_and_a_run_says_so(tmp_path: Path) -> None:
    said = _said(_DESCRIBE, PATH=str(tmp_path))
    assert said == "CPU kernels of torch (there is no C compiler)"


def test_a_compiler_that_fails_is_named_with_what_it_says(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no room\nelse' >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = _said(_DESCRIBE, PATH=f"{tmp_path}:/bin:/usr/bin", HOME=str(tmp_path))
    assert said == "CPU kernels of torch (cc failed: no room)"
    compiler.write_text("#!/bin/sh\nexit 0\n")  # and makes nothing
    said = _said(_DESCRIBE, PATH=f"{tmp_path}:/bin:/usr/bin", HOME=str(tmp_path))
    assert said.startswith("CPU kernels of torch (cc failed: ")


@needs_compiler
def test_what_was_compiled_is_kept_and_other_users_cannot_replace_it(tmp_path: Path) -> None:
    for _ in range(2):
        assert _said(_DESCRIBE, HOME=str(tmp_path)) == "CPU kernels, compiled here"
        (kept,) = tmp_path.rglob("*.so")
    kept.parent.chmod(0o777)
    kept.write_bytes(b"somebody else's")
    assert _said(_DESCRIBE, HOME=str(tmp_path)) == "CPU kernels, compiled here"
    kept.parent.chmod(0o700)
    assert "failed" in _said(_DESCRIBE, HOME=str(tmp_path))
    # A home that cannot be written.
    assert _said(_DESCRIBE, HOME="/proc") == "CPU kernels, compiled here"


@needs_compiler
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mone_megatron.kernels import ops\n" + _DESCRIBE]
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        assert process.communicate(timeout=300)[0].strip() == "CPU kernels, compiled here"
    assert len(list((tmp_path / ".cache").rglob("*"))) == 3  # two folders and the library


@needs_compiler
def test_a_norm_of_rows_that_lie_in_any_way() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [
        random(6, 2, 5, 32)[:, :, 1:4],
        random(4, 1, 8).expand(4, 3, 8),
        random(1, 8).expand(5, 3, 8),
        random(8, 4, 6, 2).transpose(0, 2),
        random(2, 3, 4, 10)[:, :2, :3, :8],
        random(9),
    ]
    for x in inputs:
        weight = random(x.shape[-1]).requires_grad_()
        grads = [random(*x.shape), torch.ones(()).expand(x.shape), random(*x.shape, 2)[..., 0]]
        for grad in grads:
            leaf = x.detach().requires_grad_()
            ours = rms_norm_cpu.rms_norm(leaf, weight, 1e-5)
            theirs = F.rms_norm(leaf, (x.shape[-1],), weight, 1e-5)
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
            mine, wanted = (
                torch.autograd.grad(one, (leaf, weight), grad) for one in (ours, theirs)
            )
            for one, other in zip(mine, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5)


def test_arguments_are_those_of_the_source() -> None:
    """Each function has as many parameters in C as ctypes is told."""
    source = compiled_cpu._SOURCE.read_text(encoding="ascii")
    for name, arguments in compiled_cpu._ARGUMENTS.items():
        match = re.search(rf"(void|int64_t) {name}\(([^)]*)\)", source)
        assert match is not None, name
        parameters = match[2].split(",")
        kinds = [
            compiled_cpu._P if "*" in parameter
            else {"int64_t": compiled_cpu._N, "float": compiled_cpu._F, "int": compiled_cpu._T}[
                parameter.split()[0]
            ]
            for parameter in parameters
        ]  # fmt: skip
        assert kinds == arguments, name
        assert (match[1] == "void") == (compiled_cpu._RESULTS.get(name) is None), name
