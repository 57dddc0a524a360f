"""The fast operations against the reference where speed could have cost exactness."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import cpu, ops, reference
from mone_megatron.kernels.reference import Keep, TopK, WeightSums

pytestmark = pytest.mark.usefixtures("cpu_functions")

# Rows in which several blocks meet and the last is not full; one block; fewer rows than a block.
SHAPES = [(1100, 192), (341, 192), (3, 7), (5, 70000)]


def _inputs(rows: int, neurons: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Halves of one tensor, as the grouped product gives them.
    gate, up = torch.randn(rows, 2 * neurons, generator=generator).chunk(2, dim=-1)
    mask = reference.topk_mask(F.silu(gate).abs(), max(1, neurons // 4))
    return gate, up, mask, torch.rand(rows, generator=generator)


def _sums(rows: int, *, normalize: bool, segments: int = 3, in_order: bool = False) -> WeightSums:
    """Rows in no order unless asked, and one segment without any."""
    index = torch.randint(segments, (rows,), generator=torch.Generator().manual_seed(7))
    if in_order:
        # The empty one in the middle.
        index = index.sort().values
        index = index + (index >= segments // 2)
    return WeightSums(index, segments + 1, normalize=normalize, in_order=in_order)


def _by_definition(
    gate: Tensor,
    up: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    sums: WeightSums,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = F.silu(gate).abs() * mask
    segment = F.one_hot(sums.segment_T, sums.segments).T.float()
    if sums.normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    hidden = reference.selected_glu(gate, up, mask, scale)
    return hidden, segment @ weights, segment @ mask.float()


def _values_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Keep, Tensor],
    *,
    normalize: bool,
    in_order: bool = False,
    segments: int = 3,
) -> dict[str, Tensor]:
    gate, up, mask, scale = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (gate, up, scale)]
    hidden, sums, counts = function(
        leaves[0],
        leaves[1],
        mask,
        leaves[2],
        _sums(len(gate), normalize=normalize, in_order=in_order, segments=segments),
    )
    grads = [
        torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        for seed, value in enumerate((hidden, sums))
    ]
    gradients = torch.autograd.grad([hidden, sums], leaves, grads)
    assert not counts.requires_grad
    values = (hidden.detach(), sums.detach(), counts, *gradients)
    return dict(zip(("hidden", "sums", "counts", "gate", "up", "scale"), values, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
# Rows in no order, in a few segments that are cut apart, in so many that they are not.
@pytest.mark.parametrize(("in_order", "segments"), [(False, 3), (True, 3), (True, 90)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_sums_counts_and_gradients_equal_the_definition(
    shape: tuple[int, int], in_order: bool, segments: int, normalize: bool
) -> None:
    inputs = _inputs(*shape)
    settings = {"normalize": normalize, "in_order": in_order, "segments": segments}
    ours = _values_and_gradients(ops.selected_glu_and_sums, inputs, **settings)
    expected = _values_and_gradients(_by_definition, inputs, **settings)
    assert torch.equal(ours["counts"], expected["counts"])
    for name in ("hidden", "gate", "up"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-6)
    # Sums in another order.
    for name, terms in (("sums", shape[0]), ("scale", shape[1])):
        atol = 1e-6 * terms**0.5
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=atol)


def test_a_row_of_zeros_has_no_weights_and_finite_gradients() -> None:
    gate, up, mask, scale = _inputs(10, 8)
    gate[3] = 0
    inputs = (gate, up, mask, scale)
    ours = _values_and_gradients(ops.selected_glu_and_sums, inputs, normalize=True)
    expected = _values_and_gradients(_by_definition, inputs, normalize=True)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_blocks_do_not_show_without_weights(shape: tuple[int, int], masked: bool) -> None:
    gate, up, mask, scale = _inputs(*shape)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (ops.selected_glu, reference.selected_glu):
        leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
        hidden = function(leaves[0], leaves[1], mask if masked else None, scale)
        results.append([hidden.detach(), *torch.autograd.grad(hidden, leaves, grad)])
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_each_of_the_two_outputs_backpropagates_alone() -> None:
    gate, up, mask, scale = _inputs(20, 12)
    for which in (0, 1):
        gradients = []
        for function in (ops.selected_glu_and_sums, _by_definition):
            leaf = gate.clone().requires_grad_()
            output = function(leaf, up, mask, scale, _sums(20, normalize=True))[which]
            gradients.append(torch.autograd.grad(output.square().sum(), leaf)[0])
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=2e-6)


def test_without_a_scale() -> None:
    gate, up, mask, _ = _inputs(1100, 192)
    results = []
    for function in (ops.selected_glu_and_sums, _by_definition):
        leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
        hidden, sums, _ = function(*leaves, mask, None, _sums(1100, normalize=True))
        results.append(torch.autograd.grad(hidden.square().sum() + sums.square().sum(), leaves))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)


def test_other_dtypes_take_the_eager_path() -> None:
    gate, up, mask, scale = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in _inputs(9, 8)
    )
    hidden, *_ = ops.selected_glu_and_sums(gate, up, mask, scale, _sums(9, normalize=True))
    assert torch.equal(hidden, reference.selected_glu(gate, up, mask, scale))


def test_calls_of_several_sizes_and_threads_do_not_share_results() -> None:
    """Temporaries are kept from call to call; segments are cut over three blocks of the largest."""
    many = [_inputs(rows, 192, seed) for seed, rows in enumerate((2100, 341, 3, 1500))]

    def run(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        gate, up, _, scale = inputs
        rule = (gate, up, TopK(48, "abs_activation"), scale)
        return _values_and_gradients(ops.selected_glu_and_sums, rule, normalize=True, in_order=True)

    one_after_another = [run(inputs) for inputs in many]
    with ThreadPoolExecutor(3) as threads:
        at_once = list(threads.map(run, many * 3))
    for number, found in enumerate(at_once):
        for name, value in one_after_another[number % len(many)].items():
            assert torch.equal(found[name], value), name
    for inputs, found in zip(many, one_after_another, strict=True):
        expected = _values_and_gradients(_by_definition, inputs, normalize=True, in_order=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", ["gate", "up"])
def test_nan_reaches_values_and_gradients_of_its_row(where: str) -> None:
    gate, up, _, scale = _inputs(600, 200)
    (gate if where == "gate" else up)[400, 17] = torch.nan
    mask = ops.topk_mask(F.silu(gate).abs(), 50)
    mask[400, 17] = False  # not even when it is not selected
    inputs = (gate, up, mask, scale)
    ours = _values_and_gradients(ops.selected_glu_and_sums, inputs, normalize=False)
    assert ours["hidden"][400, 17].isnan()
    assert ours["sums"][:, 17].isnan().any() == (where == "gate")
    assert ours["gate"][400].isnan().any()
    assert ours["scale"][400].isnan()
    rest = torch.arange(600) != 400
    assert all(ours[name][rest].isfinite().all() for name in ("hidden", "gate", "up", "scale"))


@pytest.mark.parametrize("score", ["abs_activation", "abs_gate", "signed_gate", "abs_product"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_rule_is_the_mask_that_it_stands_for(score: str, spoilt: bool) -> None:
    """Also where scores tie or are NaN, in the middle of a piece."""
    gate, up, _, scale = _inputs(1100, 192)
    if spoilt:
        gate[500], up[500] = gate[500].round(), 1.0
        gate[700, 3] = torch.nan
    mask = reference.kept_mask(gate, up, TopK(48, score), F.silu)
    assert mask is not None
    settings = {"normalize": True, "in_order": True}
    by_rule, by_mask = (
        _values_and_gradients(ops.selected_glu_and_sums, (gate, up, keep, scale), **settings)
        for keep in (TopK(48, score), mask)
    )
    for name, value in by_rule.items():
        assert torch.equal(value.nan_to_num(7.0), by_mask[name].nan_to_num(7.0)), name


@given(
    rows=st.integers(1, 40),
    neurons=st.integers(1, 33),
    levels=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_masks_of_tied_rows_equal_the_reference_over_small_blocks(
    rows: int, neurons: int, levels: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, neurons))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, neurons), generator=generator).float()
    if levels == 6:
        scores[torch.rand(rows, neurons, generator=generator) < 0.05] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK_ELEMENTS", 3 * neurons)
        assert torch.equal(ops.topk_mask(scores, k), reference.topk_mask(scores, k))


def test_the_mask_of_strided_scores() -> None:
    scores = torch.randn(700, 400, generator=torch.Generator().manual_seed(0))[:, ::2]
    assert torch.equal(ops.topk_mask(scores, 50), reference.topk_mask(scores, 50))
