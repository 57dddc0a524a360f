"""Routing in one pass is what plain torch computes in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels.compiled_cpu import compiled
from mone_megatron.kernels.router_cpu import Routing, route, supports

pytestmark = pytest.mark.skipif(compiled().library is None, reason=compiled().problem)


def plainly(logits_NA: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routes by torch's operations, as the papers write it."""
    tokens, experts = logits_NA.shape
    k = routing.experts_per_token
    best_NK = logits_NA.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen_NA = torch.zeros_like(logits_NA, dtype=torch.bool).scatter(1, best_NK, True)
    scores_NA = logits_NA.softmax(dim=1)
    among_NA = logits_NA.masked_fill(~chosen_NA, -torch.inf).softmax(dim=1)
    weights_NA = (scores_NA * chosen_NA if routing.of_all else among_NA) * routing.scaling
    z_loss = routing.z_coeff * logits_NA.logsumexp(dim=1).square().mean()
    share_A = chosen_NA.sum(dim=0) / (tokens * k)
    balance_loss = routing.balance_coeff * experts * (share_A * scores_NA.mean(dim=0)).sum()
    return weights_NA, chosen_NA, z_loss, balance_loss


@given(
    tokens=st.integers(1, 70),
    experts=st.integers(1, 40),
    of_all=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
    z_coeff=st.sampled_from([0.0, 0.3]),
    balance_coeff=st.sampled_from([0.0, 0.7]),
    size=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_weights_losses_and_gradients(
    tokens: int,
    experts: int,
    of_all: bool,
    scaling: float,
    z_coeff: float,
    balance_coeff: float,
    size: float,
    seed: int,
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(1, min(16, experts)))
    routing = Routing(k, of_all, scaling, z_coeff, balance_coeff)
    draw = torch.Generator().manual_seed(seed)
    given_NA = (size * torch.randn(tokens, experts, generator=draw)).requires_grad_()
    factor_NA = torch.randn(tokens, experts, generator=draw)
    assert supports(given_NA, routing)
    found = route(given_NA, routing)
    wide_NA = given_NA.detach().double().requires_grad_()
    expected = plainly(wide_NA, routing)
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-6)
    # As losses are attached to the weights: each with a gradient of its own.
    (found[0] * factor_NA).sum().add(found[2] * 0.5 + found[3] * 2).backward()
    (expected[0] * factor_NA).sum().add(expected[2] * 0.5 + expected[3] * 2).backward()
    assert given_NA.grad is not None
    assert wide_NA.grad is not None
    close = 1e-5 * max(1.0, float(wide_NA.grad.abs().max()))
    torch.testing.assert_close(given_NA.grad, wide_NA.grad.float(), rtol=1e-4, atol=close)


def test_ranks_that_share_a_microbatch_have_its_losses_together() -> None:
    draw = torch.Generator().manual_seed(5)
    whole_NA = torch.randn(12, 5, generator=draw, requires_grad=True)
    parts = [part.detach().requires_grad_() for part in whole_NA.chunk(2)]
    counts = [route(part, Routing(2))[1].sum(dim=0) for part in parts]
    _, _, z_loss, balance_loss = route(whole_NA, Routing(2, z_coeff=0.1, balance_coeff=0.2))
    (z_loss + balance_loss).backward()
    shared = Routing(2, z_coeff=0.1 / 2, balance_coeff=0.2, ranks=2)
    losses = [
        route(part, shared, lambda counts_A, other=other: counts_A + other)[2:]
        for part, other in zip(parts, reversed(counts), strict=True)
    ]
    torch.testing.assert_close(sum(z for z, _ in losses), z_loss)
    torch.testing.assert_close(sum(balance for _, balance in losses), balance_loss)
    for z, balance in losses:
        (z + balance).backward()
    assert whole_NA.grad is not None
    torch.testing.assert_close(
        torch.cat([part.grad for part in parts if part.grad is not None]), whole_NA.grad
    )


@pytest.mark.parametrize("output", [0, 2, 3])
def test_one_output_alone_has_its_gradient(output: int) -> None:
    routing = Routing(2, z_coeff=0.1, balance_coeff=0.1)
    draw = torch.Generator().manual_seed(1)
    given_NA = torch.randn(9, 5, generator=draw, requires_grad=True)
    wide_NA = given_NA.detach().double().requires_grad_()
    # The sum of a token's weights is 1 whatever its logits are.
    factor_NA = torch.randn(9, 5, generator=draw)
    for logits_NA, routed in (given_NA, route), (wide_NA, plainly):
        result = routed(logits_NA, routing)[output]
        (result * factor_NA if output == 0 else result).sum().backward()
    assert given_NA.grad is not None
    assert wide_NA.grad is not None
    torch.testing.assert_close(given_NA.grad, wide_NA.grad.float(), rtol=1e-5, atol=1e-7)


def test_the_first_of_equal_logits_is_chosen() -> None:
    logits_NA = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    _, chosen_NA, _, _ = route(logits_NA, Routing(2))
    assert chosen_NA.tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("of_all", [False, True])
def test_what_is_no_number_spreads_over_its_token_alone(odd: float, of_all: bool) -> None:
    logits_NA = torch.zeros(3, 4)
    logits_NA[1, 2] = odd
    weights_NA, chosen_NA, z_loss, _ = route(logits_NA, Routing(2, of_all, z_coeff=1.0))
    assert weights_NA[1, chosen_NA[1]].isnan().all()
    assert not z_loss.isfinite()
    assert weights_NA[[0, 2]].isfinite().all()
    assert (chosen_NA.sum(dim=1) == 2).all()


def test_threads_change_no_bit() -> None:
    draw = torch.Generator().manual_seed(3)
    logits_NA = torch.randn(1000, 24, generator=draw)
    factor_NA = torch.randn(1000, 24, generator=draw)
    before = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        given_NA = logits_NA.clone().requires_grad_()
        weights_NA, chosen_NA, *losses = route(given_NA, Routing(3, True, 1.5, 0.1, 0.2))
        (weights_NA * factor_NA).sum().add(sum(losses)).backward()
        results.append([weights_NA, chosen_NA, *losses, given_NA.grad])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_it_cannot_do_is_said() -> None:
    logits_NA = torch.zeros(3, 20)
    assert supports(logits_NA, Routing(16))
    assert not supports(logits_NA, Routing(17))
    assert not supports(logits_NA, Routing(21))
    assert not supports(logits_NA[:0], Routing(1))
    assert not supports(logits_NA.double(), Routing(1))
    assert not supports(logits_NA.bfloat16(), Routing(1))
    assert not supports(logits_NA.to("meta"), Routing(1))
