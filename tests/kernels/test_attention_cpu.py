"""Attention on CPU that keeps its weights: torch's numbers, and nothing of later tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mone_megatron.kernels import attention_cpu
from mone_megatron.kernels.attention_blocks import FEWEST_TOKENS, MOST_TOKENS, weights_of_head

pytestmark = pytest.mark.usefixtures("cpu_functions")

# Tokens, sequences, query heads, key heads, width: whole blocks and a last one that is not.
SHAPES = [
    (256, 2, 6, 2, 32),
    (200, 1, 4, 4, 16),
    (193, 3, 8, 1, 8),
    (512, 1, 2, 2, 64),
    (1, 2, 2, 1, 8),
]


def _inputs(length: int, batch: int, heads: int, groups: int, width: int) -> list[Tensor]:
    """Returns queries of their own, and keys and values as parts of one projection."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, batch, heads, width, generator=generator)
    both = torch.randn(length, batch, groups, 3 * width, generator=generator)
    parts = both[..., :width], both[..., 2 * width :]
    return [query.requires_grad_(), *(part.detach().requires_grad_() for part in parts)]


def _torchs(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    heads = [x.double().permute(1, 2, 0, 3) for x in (query, key, value)]
    context = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    inputs = _inputs(*shape)
    assert not inputs[2].is_contiguous()
    grad = torch.randn(*shape[:2], shape[2] * shape[4], generator=torch.Generator().manual_seed(0))
    ours = attention_cpu.causal_attention(*inputs, 0.3)
    theirs = _torchs(*inputs, 0.3)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=2e-6)
    expected = torch.autograd.grad(theirs, inputs, grad.double())
    for mine, other in zip(torch.autograd.grad(ours, inputs, grad), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_later_tokens_change_nothing() -> None:
    inputs = _inputs(200, 2, 4, 2, 16)
    before = attention_cpu.causal_attention(*inputs, 0.25)
    for place in (1, 63, 64, 130):
        changed = [x.detach().clone() for x in inputs]
        for x in changed:
            x[place:] = 7.0
        after = attention_cpu.causal_attention(*changed, 0.25)
        assert torch.equal(after[:place], before[:place])
        assert not torch.equal(after[place:], before[place:])


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = _inputs(200, 2, 4, 2, 16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        training = attention_cpu.causal_attention(*inputs, 0.25)
    assert max(tensor.numel() for tensor in kept) == 2 * 4 * weights_of_head(200)
    with torch.no_grad():
        assert torch.equal(attention_cpu.causal_attention(*inputs, 0.25), training)


@pytest.mark.parametrize("groups", [2, 4])
def test_heads_by_themselves_are_the_same_to_the_last_bit(groups: int) -> None:
    """As on tensor-parallel ranks, which have some of the heads each."""
    inputs = _inputs(256, 2, 8, groups, 16)
    grad = torch.randn(256, 2, 8 * 16, generator=torch.Generator().manual_seed(0))
    whole = attention_cpu.causal_attention(*inputs, 0.25)
    gradients = torch.autograd.grad(whole, inputs, grad)
    for rank in (0, 1):
        parts = [x.detach().chunk(2, dim=2)[rank].requires_grad_() for x in inputs]
        part = attention_cpu.causal_attention(*parts, 0.25)
        assert torch.equal(part, whole.chunk(2, dim=2)[rank])
        mine = torch.autograd.grad(part, parts, grad.chunk(2, dim=2)[rank])
        for a, b in zip(mine, gradients, strict=True):
            assert torch.equal(a, b.chunk(2, dim=2)[rank])


def test_what_it_is_used_for() -> None:
    query, key, value = (x.detach() for x in _inputs(256, 1, 2, 2, 8))
    assert attention_cpu.supports(query, key, value)
    assert not attention_cpu.supports(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert not attention_cpu.supports(query, key, value[..., :4])
    assert not attention_cpu.supports(query[:200], key, value)
    for length, used in ((FEWEST_TOKENS - 1, False), (FEWEST_TOKENS, True), (MOST_TOKENS, True),
                         (MOST_TOKENS + 1, False)):  # fmt: skip
        shape = length, 1, 2, 8
        assert attention_cpu.supports(*(torch.zeros(shape) for _ in range(3))) is used
