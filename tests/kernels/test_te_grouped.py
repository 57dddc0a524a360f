"""Transformer Engine's grouped products: our calls, given to a stand-in for its function.

Transformer Engine needs a GPU. The stand-in multiplies as the documentation of
``general_grouped_gemm`` says; with a GPU and Transformer Engine its own is compared, too.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import ops, te_grouped
from mone_megatron.kernels.te_grouped import grouped_mm

COUNTS = [[3, 0, 5, 1], [0, 0, 9, 0], [2, 4, 3, 0]]


def documented_gemm(
    A: list[Tensor],
    B: list[Tensor],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    *,
    layout: str,
    m_splits: list[int],
    grad: bool,
    single_output: bool,
    accumulate: bool = False,
) -> None:
    """The result's shape comes from A and B alone, and results lie end to end in one output."""
    assert len(A) == len(B) == len(quantization_params) == len(m_splits)
    assert all(one.is_contiguous() for one in (*A, *B, *out))
    products = [
        (b.T if layout[1] == "T" else b) @ (a.T if layout[0] == "T" else a)
        for a, b in zip(A, B, strict=True)
    ]
    results = list(out[0].split([len(one) for one in products])) if single_output else out
    for result, product in zip(results, products, strict=True):
        assert result.dtype == out_dtype
        if accumulate:
            result.add_(product)
        else:
            result.copy_(product)


def _compare(device: str, dtype: torch.dtype, counts: list[int], *, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 16, 8) if transposed else (4, 8, 16)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)  # noqa: E731
    rows, stored, grad = draw(9, 8), draw(*shape), draw(9, 16)
    gemm = documented_gemm if device == "cpu" else None
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    results = []
    for ours in (True, False):
        leaves = [rows.clone().requires_grad_(), stored.clone().requires_grad_()]
        weight = leaves[1].transpose(1, 2) if transposed else leaves[1]
        if ours:
            output = grouped_mm(leaves[0], weight, torch.tensor(counts), gemm)
        else:
            output = F.grouped_mm(leaves[0], weight, offs=ends)
        output.backward(grad)
        results.append((output.detach(), *(leaf.grad for leaf in leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_and_both_gradients(counts: list[int], transposed: bool) -> None:
    """Also of experts without rows, whose gradient is zero."""
    _compare("cpu", torch.float32, counts, transposed=transposed)


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_transformer_engine_itself(counts: list[int], transposed: bool) -> None:
    _compare("cuda", torch.bfloat16, counts, transposed=transposed)


def test_it_is_chosen_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_grouped, "transformer_engines", lambda: documented_gemm)
    rows, weight = torch.randn(3, 8), torch.randn(2, 8, 16)
    groups = ops.RowGroups.of(torch.tensor([1, 2]))
    expected = ops.grouped_mm(rows, weight, groups)
    ops.use_kernels("auto", "transformer_engine")
    try:
        assert ops.describe(rows.device).endswith(", Transformer Engine's grouped GEMM")
        torch.testing.assert_close(ops.grouped_mm(rows, weight, groups), expected)
    finally:
        ops.use_kernels("auto")
    assert "Transformer Engine" not in ops.describe(rows.device)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("outputs_first", [False, True])
def test_gradients_of_microbatches_are_added_where_megatron_core_keeps_them(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], outputs_first: bool
) -> None:
    """As its DistributedDataParallel does: a hook that adds what was not added, and forgets it."""
    monkeypatch.setattr(te_grouped, "transformer_engines", lambda: documented_gemm)
    monkeypatch.setattr(ops, "_grouped_gemm", "transformer_engine")
    shape = (4, 2, 8, 8) if outputs_first else (4, 8, 16)
    sums = []
    for in_place in (True, False):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
        weight.main_grad = torch.zeros(shape)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        weight.adds_to_main_grad = in_place  # type: ignore[attr-defined]
        seen = []

        def hook(weight: torch.nn.Parameter, seen: list[bool] = seen) -> None:
            assert weight.grad is not None, "or an overlapped reduction would wait for ever"
            seen.append(weight.grad_added_to_main_grad)  # type: ignore[attr-defined]
            if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
                weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
            weight.grad = None

        weight.register_post_accumulate_grad_hook(hook)
        for _ in range(3):
            rows = torch.randn(9, 8, generator=generator)
            product = ops.expert_product(
                rows, weight, ops.RowGroups.of(torch.tensor(counts)), outputs_first=outputs_first
            )
            product.backward(torch.randn(9, 16, generator=generator))
        assert seen == [in_place] * 3
        sums.append(weight.main_grad)  # type: ignore[attr-defined]
    torch.testing.assert_close(*sums)


def test_a_gradient_that_is_not_wanted_is_not_computed() -> None:
    calls = []

    def counted(*arguments: object, layout: str, **options: object) -> None:
        calls.append(layout)
        documented_gemm(*arguments, layout=layout, **options)  # type: ignore[arg-type]

    weight = torch.randn(2, 8, 16)
    rows = torch.randn(3, 8, requires_grad=True)
    grouped_mm(rows, weight, torch.tensor([1, 2]), counted).sum().backward()
    assert calls == ["NN", "TN"]


def test_a_weight_that_would_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="strides"):
        grouped_mm(
            torch.randn(3, 4), torch.randn(2, 8, 5)[:, ::2], torch.tensor([1, 2]), documented_gemm
        )
