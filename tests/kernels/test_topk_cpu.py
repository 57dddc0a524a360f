"""The few largest of short rows: torch's values, and the first of equal ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone_megatron.kernels import topk_cpu

pytestmark = pytest.mark.usefixtures("cpu_functions")


@given(
    rows=st.integers(0, 9),
    n=st.integers(1, 40),
    kind=st.sampled_from(["normal", "levels", "odd"]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_values_are_torchs_and_places_hold_them(
    rows: int, n: int, kind: str, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan")])
    values = {
        "normal": torch.randn(rows, n, generator=generator),
        "levels": torch.randint(3, (rows, n), generator=generator).float(),
        "odd": odd[torch.randint(len(odd), (rows, n), generator=generator)],
    }[kind]
    found, places = topk_cpu.topk(values, k, dim=1)
    torch.testing.assert_close(found, values.topk(k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, values.gather(1, places), rtol=0, atol=0, equal_nan=True)
    for row in places.tolist():
        assert len(set(row)) == k


def test_the_first_of_equal_values_comes_first(cpu_functions: str) -> None:
    if cpu_functions == "torch":
        pytest.skip("torch leaves the order of equal values open")
    values = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -1.0, 0.0]])
    assert topk_cpu.topk(values, 4)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 4]]


def test_gradients_are_torchs() -> None:
    values = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = topk_cpu.topk(values, 3)[0], values.topk(3).values
    for one in (ours, theirs):
        assert one.requires_grad
    (mine,), (wanted,) = (torch.autograd.grad(one, values, grad) for one in (ours, theirs))
    assert torch.equal(mine, wanted)


def test_what_is_no_short_row_of_fp32_is_left_to_torch() -> None:
    values = torch.randn(3, 4, 30, generator=torch.Generator().manual_seed(0))
    for passed, k, dim in ((values, 2, 1), (values[0].double(), 2, 1), (values[0], 20, -1)):
        found, places = topk_cpu.topk(passed, k, dim)
        wanted = passed.topk(k, dim)
        assert torch.equal(found, wanted.values)
        assert torch.equal(places, wanted.indices)
    smallest, _ = topk_cpu.topk(values[0], 2, 1, largest=False)
    assert torch.equal(smallest, values[0].topk(2, 1, largest=False).values)
