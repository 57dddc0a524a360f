"""The packed memory mode in torch: the same numbers, fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.kernels.packed import pack_bits, unpack_bits
from mone_megatron.kernels.reference import Activate, Packed, TopK, WeightSums
from mone_megatron.methods.activations import ACTIVATIONS

ROWS, NEURONS, KEPT = 40, 64, 16


def _leaves(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(ROWS, 2 * NEURONS, generator=generator).to(dtype).requires_grad_()
    scale = torch.rand(ROWS, generator=generator).requires_grad_()
    weight = torch.randn(NEURONS, 8, generator=generator).to(dtype).requires_grad_()
    return gate_up, scale, weight


def _sums(normalize: bool) -> WeightSums:
    return WeightSums(torch.arange(ROWS) % 3, 4, normalize=normalize)


def _values_and_gradients(
    dtype: torch.dtype, activate: Activate, packed: Packed | None, *, normalize: bool
) -> list[Tensor]:
    gate_up, scale, weight = _leaves(dtype)
    gate, up = (gate_up * 1).chunk(2, dim=-1)
    hidden, weight_sum, kept = ops.selected_glu_and_sums(
        gate, up, TopK(KEPT, "abs_product"), scale, _sums(normalize), activate, packed=packed
    )
    if packed is None:
        output = hidden @ weight
    else:
        with ops.rebuilt_when_needed(hidden, packed):
            output = hidden @ weight
    loss = output.float().square().sum() + (weight_sum * torch.linspace(-1, 1, NEURONS)).sum()
    gradients = torch.autograd.grad(loss, (gate_up, scale, weight))
    return [hidden.detach(), weight_sum.detach(), kept, output.detach(), *gradients]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS.names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_full_mode(
    dtype: torch.dtype, activation: str, normalize: bool
) -> None:
    activate = ACTIVATIONS[activation].function
    full = _values_and_gradients(dtype, activate, None, normalize=normalize)
    packed = _values_and_gradients(dtype, activate, Packed(KEPT), normalize=normalize)
    for ours, wanted in zip(packed, full, strict=True):
        assert torch.equal(ours, wanted)


def saved_bytes(packed: Packed | None, dtype: torch.dtype) -> int:
    """Of the storages that autograd holds from the gated unit to the end of the projection."""
    gate_up, scale, weight = _leaves(dtype)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (scale, weight)}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    gate, up = (gate_up * 1).chunk(2, dim=-1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = ops.selected_glu(gate, up, TopK(KEPT, "abs_activation"), scale, packed=packed)
        if packed is None:
            output = hidden @ weight
    if packed is not None:
        # Its hooks take the place of ours; what they save is what the unit saved.
        with ops.rebuilt_when_needed(hidden, packed):
            output = hidden @ weight
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype: torch.dtype) -> None:
    element = torch.finfo(dtype).bits // 8
    packed = saved_bytes(Packed(KEPT), dtype)
    assert packed == ROWS * (2 * KEPT * element + NEURONS // 8)
    pair, hidden = ROWS * 2 * NEURONS * element, ROWS * NEURONS * element
    assert saved_bytes(None, dtype) >= pair + hidden
    assert pair / packed >= 3.5
    assert (pair + hidden) / packed >= 5


def test_the_projection_keeps_neither_its_input_nor_a_copy() -> None:
    gate_up, scale, weight = _leaves(torch.float32)
    gate, up = (gate_up * 1).chunk(2, dim=-1)
    packed = Packed(KEPT)
    hidden = ops.selected_glu(gate, up, TopK(KEPT, "abs_activation"), scale, packed=packed)
    with ops.rebuilt_when_needed(hidden, packed):
        output = hidden @ weight
    expected = hidden.detach().clone()
    # Were it kept, this would change the gradient, or be refused.
    hidden.detach().zero_()
    (gradient,) = torch.autograd.grad(output.sum(), weight)
    assert torch.equal(gradient, expected.T @ torch.ones(ROWS, 8))


def test_rows_that_keep_nothing() -> None:
    gate_up, scale, _ = _leaves(torch.float32)
    with torch.no_grad():
        gate_up[3, 5] = torch.nan
    gate, up = (gate_up * 1).chunk(2, dim=-1)
    hidden = ops.selected_glu(gate, up, TopK(KEPT, "abs_activation"), scale, packed=Packed(KEPT))
    assert hidden[3].isnan().any()
    (gradient,) = torch.autograd.grad(hidden.sum(), gate_up)
    rest = torch.arange(ROWS) != 3
    assert gradient[rest].isfinite().all()
    assert gradient[rest].ne(0).sum() == (ROWS - 1) * 2 * KEPT
    # The NaN of the loss comes back.
    hidden = ops.selected_glu(*(gate_up * 1).chunk(2, dim=-1), TopK(KEPT, "abs_gate"), scale,
                              packed=Packed(KEPT))  # fmt: skip
    (gradient,) = torch.autograd.grad((hidden * torch.nan).sum(), gate_up)
    assert gradient[3].isnan().any()


def test_weights_of_all_neurons_are_refused() -> None:
    gate, up = torch.ones(2, 3, 4).unbind()
    sums = WeightSums(torch.zeros(3, dtype=torch.long), 1, "all")
    with pytest.raises(ValueError, match=r"mone\.memory: packed forgets .* mone\.balance\.weights"):
        ops.selected_glu_and_sums(gate, up, TopK(2, "abs_gate"), None, sums, packed=Packed(2))


@given(rows=st.integers(0, 5), neurons=st.integers(1, 40), seed=st.integers(0, 1000))
def test_bits_hold_the_mask(rows: int, neurons: int, seed: int) -> None:
    mask = torch.rand(rows, neurons, generator=torch.Generator().manual_seed(seed)) < 0.4
    bits = pack_bits(mask)
    assert bits.shape == (rows, -(-neurons // 8))
    assert torch.equal(unpack_bits(bits, neurons), mask)
    if rows:
        assert bits[0, 0] == sum(2**i for i, kept in enumerate(mask[0, :8].tolist()) if kept)


def test_the_reference_can_be_asked_for() -> None:
    assert ops.describe(torch.device("cpu")).startswith("CPU kernels")
    gate, up = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    fast = ops.selected_glu(gate, up, TopK(2, "abs_gate"), None)
    ops.use_kernels("reference")
    try:
        assert ops.describe(torch.device("cpu")) == "reference kernels"
        slow = ops.selected_glu(gate, up, TopK(2, "abs_gate"), None)
    finally:
        ops.use_kernels("auto")
    torch.testing.assert_close(fast, slow)
    assert torch.equal(slow != 0, fast != 0)
    assert slow.ne(0).sum() == 10
    assert F.silu(gate).mul(up).isclose(slow).sum() == 10
