"""Grouped products of experts of which some have no rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import ops, te_grouped

COUNTS = [[5, 0, 3], [0, 0, 4], [7, 1, 0], [0, 2, 0]]


def _weight_gradient(counts: list[int], device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 64, generator=generator).to(device, dtype)
    weight = torch.randn(len(counts), 32, 64, generator=generator).to(device, dtype)
    weight.requires_grad_()
    groups = ops.RowGroups.of(torch.tensor(counts, device=device))
    # What a gradient that is not written would show.
    poison = torch.full((len(counts), 32, 64), float("nan"), dtype=dtype, device=device)
    del poison
    output = ops.grouped_mm(rows, weight.transpose(1, 2), groups)
    output.backward(torch.ones_like(output))
    assert weight.grad is not None
    return weight.grad


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_without_rows_have_no_gradient_on_this_gpu(counts: list[int]) -> None:
    grad = _weight_gradient(counts, "cuda", torch.bfloat16).float().cpu()
    expected = _weight_gradient(counts, "cpu", torch.float32)
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2)
    for expert, count in enumerate(counts):
        assert count or not grad[expert].any()


@pytest.mark.parametrize("counts", COUNTS)
def test_what_a_product_left_unwritten_is_zero(
    monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> None:
    """With a product that leaves NaN there, as memory might hold."""
    expected = _weight_gradient(counts, "cpu", torch.float32)

    def unwritten(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        empty = torch.tensor(counts).eq(0).view(-1, 1, 1)
        weight.register_hook(lambda grad: grad.masked_fill(empty, float("nan")))
        return original(rows, weight, offs=offs)

    original = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", unwritten)
    assert _weight_gradient(counts, "cpu", torch.float32).isnan().any()
    monkeypatch.setattr(ops, "leaves_gradients_unwritten", lambda device: True)
    torch.testing.assert_close(_weight_gradient(counts, "cpu", torch.float32), expected)


def test_an_engine_that_cannot_be_imported_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").touch()
    broken = "raise ImportError('built for torch 1.0')\n"
    (package / "pytorch" / "__init__.py").write_text(broken, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    te_grouped.have_transformer_engine.cache_clear()
    with pytest.raises(ValueError, match=r"built for torch 1\.0.*uninstall"):
        te_grouped.have_transformer_engine()
    te_grouped.have_transformer_engine.cache_clear()
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)
