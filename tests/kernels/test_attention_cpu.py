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


MADE = [shape for shape in SHAPES if attention_cpu.keeps_weights(shape[0])]


def _projections(
    length: int, batch: int, heads: int, groups: int, width: int
) -> tuple[list[Tensor], Tensor, attention_cpu.Heads]:
    """Returns projections and the weights of both norms, angles, and how heads are made."""
    generator = torch.Generator().manual_seed(length)
    per_key = heads // groups
    mixed = torch.randn(length, batch, groups * (per_key + 2) * width, generator=generator)
    norms = [torch.rand(width, generator=generator) + 0.5 for _ in range(2)]
    half = torch.arange(length).unsqueeze(-1) * 10.0 ** -torch.linspace(0, 3, width // 2)
    angles = torch.cat([half, half], dim=-1).view(length, 1, 1, width)
    leaves = [leaf.requires_grad_() for leaf in (mixed, *norms)]
    return leaves, angles, attention_cpu.Heads(per_key, 1e-5, 1e-3, 0.3)


def _one_after_the_other(
    mixed: Tensor, query_norm: Tensor, key_norm: Tensor, angles: Tensor, made: attention_cpu.Heads
) -> Tensor:
    """Norms, rotation and attention, in fp64."""
    width = len(query_norm)
    parts = mixed.double().unflatten(-1, (-1, made.per_key + 2, width))
    query, key, value = parts.split([made.per_key, 1, 1], dim=3)

    def turned(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = F.rms_norm(x.flatten(2, 3), (width,), weight.double(), eps)
        first, second = normed.chunk(2, dim=-1)
        wide = angles.double()
        return normed * wide.cos() + torch.cat([-second, first], dim=-1) * wide.sin()

    return _torchs(
        turned(query, query_norm, made.query_eps),
        turned(key, key_norm, made.key_eps),
        value.flatten(2, 3),
        made.scale,
    )


@pytest.mark.parametrize("shape", MADE, ids=str)
def test_heads_made_within_are_those_made_before(
    shape: tuple[int, ...], cpu_functions: str
) -> None:
    leaves, angles, made = _projections(*shape)
    usable = attention_cpu.makes_heads(leaves[0], *leaves[1:], angles)
    assert usable == (cpu_functions == "compiled")
    if not usable:
        return
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(*shape[:2], shape[2] * shape[4], generator=generator)
    theirs = _one_after_the_other(*leaves, angles, made)
    expected = torch.autograd.grad(theirs, leaves, grad.double())
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ours = attention_cpu.attention_of_projections(*leaves, angles, made)
            with torch.no_grad():
                alone = attention_cpu.attention_of_projections(*leaves, angles, made)
            assert torch.equal(alone, ours)
            found.append((ours, *torch.autograd.grad(ours, leaves, grad)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0][0], theirs.float(), rtol=1e-5, atol=3e-6)
    for mine, other in zip(found[0][1:], expected, strict=True):
        # Sums over all rows for the weights of the norms.
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-4)
    # BLAS's products round otherwise where several threads compute one each.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-4)


def test_squares_that_overflow_leave_no_gradient(cpu_functions: str) -> None:
    if cpu_functions == "torch":
        return  # heads are made before: tests of the norm
    leaves, angles, made = _projections(200, 1, 2, 1, 8)
    with torch.no_grad():
        leaves[0][7, 0, :8] = 1e30
    ours = attention_cpu.attention_of_projections(*leaves, angles, made)
    assert ours.isfinite().all()
    assert torch.autograd.grad(ours.sum(), leaves)[0].isnan().any()


def test_heads_of_another_kind_are_made_before() -> None:
    leaves, angles, _ = _projections(200, 1, 2, 1, 8)
    hidden, *norms = leaves
    assert not attention_cpu.makes_heads(hidden.bfloat16(), *norms, angles)
    assert not attention_cpu.makes_heads(hidden[:100], *norms, angles[:100])
    assert not attention_cpu.makes_heads(hidden, *norms, angles[..., :4])
    assert not attention_cpu.makes_heads(hidden, *norms, angles.expand(-1, 2, -1, -1))
    assert not attention_cpu.makes_heads(hidden, *norms, angles.clone().requires_grad_())
