"""The loss against torch's, whole and spread over ranks, block after block."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.model import cross_entropy
from mone_megatron.model.cross_entropy import vocab_parallel_cross_entropy
from mone_megatron.planning.memory import LOSS_BLOCK
from mone_megatron.testing.processes import Processes


def inputs(rows: int, entries: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, entries, generator=generator) * scale
    target = torch.randint(entries, (rows,), generator=generator)
    return logits, target, torch.rand(rows, generator=generator)


def by_torch(logits: Tensor, target: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, target, reduction="none")
    return losses.detach().float(), torch.autograd.grad(losses, leaf, grad.double())[0].float()


def ours(logits: Tensor, target: Tensor, grad: Tensor, **where: object) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    # As from a matrix product: the loss may overwrite what it is given.
    given_logits = leaf * 1
    settings = {"first": 0, "valid": logits.shape[-1], "group": None} | where
    losses = vocab_parallel_cross_entropy(given_logits, target, **settings)  # type: ignore[arg-type]
    gradient = torch.autograd.grad(losses, leaf, grad)[0]
    with torch.no_grad():
        kept = logits.clone()
        alone = vocab_parallel_cross_entropy(kept, target, **settings)  # type: ignore[arg-type]
    # Without a gradient nothing is overwritten, and the loss is the same.
    assert torch.equal(kept, logits)
    assert torch.equal(alone, losses)
    return losses.detach(), gradient


@given(rows=st.integers(1, 20), entries=st.integers(1, 40), seed=st.integers(0, 999))
@settings(deadline=None)
def test_it_is_torchs(rows: int, entries: int, seed: int) -> None:
    logits, target, grad = inputs(rows, entries, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_ON_CPU", 3 * entries)
        losses, gradient = ours(logits, target, grad)
    expected = by_torch(logits, target, grad)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-6)


def test_padding_has_no_influence_and_no_gradient() -> None:
    logits, target, grad = inputs(9, 20, 0)
    padded = torch.cat([logits, torch.full((9, 5), 50.0)], dim=-1)
    losses, gradient = ours(padded, target, grad, valid=20)
    expected = by_torch(logits, target, grad)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient[:, :20], expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient[:, 20:], torch.zeros(9, 5))


def test_large_logits_do_not_overflow() -> None:
    logits, target, grad = inputs(9, 20, 0, scale=1e4)
    losses, gradient = ours(logits, target, grad)
    expected = by_torch(logits, target, grad)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_a_logit_that_is_no_number_shows_in_the_loss_as_it_does_in_torchs(odd: float) -> None:
    logits, target, grad = inputs(4, 6, 0)
    logits[1, target[1] - 1] = odd
    logits[2] = odd
    losses, _ = by_torch(logits, target, grad)
    given_logits = logits.requires_grad_() * 1
    found = vocab_parallel_cross_entropy(given_logits, target, first=0, valid=6, group=None)
    assert torch.equal(found.isfinite(), losses.isfinite())
    (gradient,) = torch.autograd.grad(found, given_logits, grad)
    # What goes on training has gradients of finite losses only.
    assert gradient[[0, 3]].isfinite().all()


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, target, grad = inputs(40, 3000, 1)
    losses, gradient = ours(logits.bfloat16(), target, grad)
    assert losses.dtype is torch.float32
    expected = by_torch(logits.bfloat16(), target, grad)
    torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.float(), expected[1], rtol=2**-8, atol=1e-6)


def test_little_is_saved_for_the_backward_pass() -> None:
    logits, target, _ = inputs(64, 512, 2)
    given_logits = logits.requires_grad_() * 1
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = vocab_parallel_cross_entropy(given_logits, target, first=0, valid=512, group=None)
    assert losses.shape == (64,)
    saved.pop(given_logits.untyped_storage().data_ptr())
    assert sum(saved.values()) <= 64 * (4 + 8 + 1)


def part_of_vocabulary(seed: int) -> tuple[Tensor, Tensor]:
    """40 entries in columns of 24: the second rank has padding."""
    logits, target, grad = inputs(11, 40, seed)
    rank, columns = dist.get_rank(), 24
    padded = F.pad(logits, (0, 2 * columns - 40), value=50.0)
    losses, gradient = ours(
        padded[:, rank * columns : (rank + 1) * columns].contiguous(),
        target,
        grad,
        first=rank * columns,
        valid=min(columns, 40 - rank * columns),
        group=dist.group.WORLD,
    )
    return losses, gradient


def test_a_vocabulary_over_two_ranks(two_processes: Processes) -> None:
    (losses, first), (same_losses, second) = two_processes.run(part_of_vocabulary, seed=5)
    expected = by_torch(*inputs(11, 40, 5))
    assert torch.equal(losses, same_losses)
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-5)
    gradient = torch.cat([first, second], dim=-1)
    torch.testing.assert_close(gradient[:, :40], expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient[:, 40:], torch.zeros(11, 8))


def test_the_planner_counts_the_blocks_of_a_gpu() -> None:
    # It imports no torch, so it holds the number itself.
    assert cross_entropy._ON_GPU == LOSS_BLOCK
