"""The Triton kernels against the reference: on a GPU, and on CPU in Triton's interpreter.

Values are compared with the reference in fp32 on the same inputs and mask; masks are the
reference's in the inputs' own dtype, bit for bit. The interpreter cuts bf16 results off where a GPU
rounds them, hence one unit in the last place for those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import reference
from mone_megatron.kernels.reference import Packed, TopK, WeightSums
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.score import Neurons, Score
from mone_megatron.methods.scores import SCORES as REGISTERED

fused = pytest.importorskip("mone_megatron.kernels.fused", reason="Triton is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Those that a kernel can be asked for: they read nothing but gate and up.
SCORES = [score.name for score in REGISTERED if "down_norm" not in score.reads]
# Those that the kernels have; torch computes the others.
FUSED = [activation.name for activation in ACTIVATIONS if activation.fused is not None]
BF16_TOLERANCE = 2.0**-7
# The interpreter's, or that of ``pytest --gpu``.
DEVICE = "cpu" if fused.triton.knobs.runtime.interpret else "cuda"


@pytest.fixture(
    autouse=True,
    scope="module",
    params=[
        pytest.param("cpu"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def _device(request: pytest.FixtureRequest) -> None:
    """Every test once on the device there is."""


@pytest.fixture
def several_rows_a_program() -> Iterator[None]:
    """So that programs meet segment ends although the tests have few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_SUMMING_PROGRAMS", 3)
        yield


@dataclass(frozen=True)
class Case:
    """One call of the operation, on random inputs."""

    rows: int = 2
    neurons: int = 37
    k: int = 9
    dtype: torch.dtype = torch.float32
    score: str = "abs_activation"
    activation: str = "silu"
    keep: Literal["rule", "mask", "all"] = "rule"
    packed: bool = False
    scale_dtype: torch.dtype | None = torch.float32
    weights: Literal["selected", "all"] | None = "selected"
    normalize: bool = True
    in_order: bool = False
    # Gates and ups are multiples of this, so that scores tie; 0 for none.
    step: float = 0.25
    odd: tuple[float, ...] = ()
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """gate, up (halves of one matrix) and scale."""
        generator = torch.Generator().manual_seed(self.seed)
        both = torch.randn(self.rows, 2 * self.neurons, generator=generator)
        if self.step:
            both = (both / self.step).round() * self.step
        for number in self.odd:
            both[torch.rand(both.shape, generator=generator) < 0.03] = number
        gate, up = both.to(DEVICE, self.dtype).chunk(2, dim=-1)
        scale = None
        if self.scale_dtype is not None:
            scale = torch.rand(self.rows, generator=generator).to(DEVICE, self.scale_dtype)
        return gate, up, scale

    def sums(self) -> WeightSums | None:
        """One segment has no rows."""
        if self.weights is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        segment = torch.randint(3, (self.rows,), generator=generator).to(DEVICE)
        segment = torch.where(segment > 0, segment + 1, segment)
        if self.in_order:
            segment = segment.sort().values
        return WeightSums(segment, 4, self.weights, self.normalize, self.in_order)

    def mask(self) -> Tensor:
        """By the reference, in the inputs' own dtype."""
        gate, up, _ = self.inputs()
        mask = reference.kept_mask(
            gate, up, TopK(self.k, self.score), ACTIVATIONS[self.activation].function
        )
        return torch.ones_like(gate, dtype=torch.bool) if self.keep == "all" else mask


Results = dict[str, Tensor]


def _gradients(case: Case, outputs: list[Tensor | None], leaves: list[Tensor]) -> Results:
    generator = torch.Generator().manual_seed(99)
    present, grads = [], []
    for output in outputs:
        if output is not None:
            present.append(output)
            grad = torch.randn(output.shape, generator=generator).to(DEVICE, case.dtype)
            grads.append(grad.to(output.dtype))
    gradients = torch.autograd.grad(present, leaves, grads, allow_unused=True)
    names = ("gate", "up", "scale")
    return {f"d {name}": g for name, g in zip(names, gradients, strict=False) if g is not None}


def run(case: Case) -> Results:
    """The kernels."""
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs() if t is not None]
    # Strided rows, as the grouped product gives them.
    gate, up = torch.cat(leaves[:2], dim=-1).chunk(2, dim=-1)
    keep = {"rule": TopK(case.k, case.score), "mask": case.mask(), "all": None}[case.keep]
    hidden, weight_sum, kept = fused.fused_glu(
        gate,
        up,
        leaves[2] if len(leaves) > 2 else None,
        keep,
        activate=ACTIVATIONS[case.activation].function,
        packed=Packed(case.k) if case.packed else None,
        sums=case.sums(),
    )
    assert hidden.dtype is case.dtype
    results = {"hidden": hidden.detach()} | _gradients(case, [hidden, weight_sum], leaves)
    if weight_sum is not None:
        assert not kept.requires_grad
        results |= {"sums": weight_sum.detach(), "kept": kept}
    return results


def expected(case: Case) -> Results:
    """The reference in fp32."""
    leaves = [t.float().detach().requires_grad_() for t in case.inputs() if t is not None]
    activate, mask, sums = ACTIVATIONS[case.activation].function, case.mask(), case.sums()
    scale = leaves[2] if len(leaves) > 2 else None
    hidden = reference.selected_glu(leaves[0], leaves[1], mask, scale, activate)
    outputs: list[Tensor | None] = [hidden]
    results = {"hidden": hidden.detach()}
    if sums is not None:
        weight_sum, kept = reference.weight_sums(leaves[0], mask, sums, activate)
        outputs.append(weight_sum)
        results |= {"sums": weight_sum.detach(), "kept": kept}
    return results | _gradients(case, outputs, leaves)


def check(case: Case) -> Results:
    ours, wanted = run(case), expected(case)
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        if name == "kept":
            assert torch.equal(value, wanted[name])
            continue
        rtol, atol = 2e-6, 2e-6 * case.neurons**0.5
        if value.dtype is torch.bfloat16:
            rtol, atol = BF16_TOLERANCE, 1e-6
        torch.testing.assert_close(
            value.float(),
            wanted[name],
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name} of {case}: {text}",
        )
    return ours


def masks(case: Case) -> Tensor:
    """What the kernel selects, told by the counts of segments of one row each."""
    gate, up, _ = case.inputs()
    sums = WeightSums(torch.arange(case.rows, device=DEVICE), case.rows, in_order=True)
    _, _, kept = fused.fused_glu(
        gate,
        up,
        None,
        TopK(case.k, case.score),
        activate=ACTIVATIONS[case.activation].function,
        packed=None,
        sums=sums,
    )
    return kept.bool()


@pytest.mark.parametrize("activation", FUSED)
def test_bf16_activations_are_those_of_torch_for_every_number(activation: str) -> None:
    assert fused.scores_equal_torch(ACTIVATIONS[activation].function, torch.device(DEVICE))


@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_equal_the_reference_bit_for_bit(
    dtype: torch.dtype, score: str, activation: str
) -> None:
    # In bf16 many scores tie without help.
    case = Case(2, 45, 11, dtype, score, activation, step=0.125 * (dtype is torch.float32))
    mask = masks(case)
    assert torch.equal(mask, case.mask())
    assert mask.sum(-1).eq(11).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_signed_scores_below_zero(dtype: torch.dtype) -> None:
    case = Case(3, 20, 15, dtype, "signed_gate")
    assert torch.equal(masks(case), case.mask())


def test_torch_scores_are_taken_where_the_kernels_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "scores_equal_torch", lambda *_: False)
    case = Case(dtype=torch.bfloat16, score="abs_product", step=0)
    assert torch.equal(masks(case), case.mask())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_score_that_no_kernel_knows_is_ranked_as_torch_ranks_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, signed: bool
) -> None:
    """It fell through to |a| in bf16, and a signed one was ranked by its magnitude."""

    def new(neurons: Neurons) -> Tensor:
        return neurons.up if signed else neurons.up.abs()

    name = f"new_{signed}"
    score = Score(name, "u", "a test", new, frozenset({"up"}), signed=signed)
    monkeypatch.setitem(REGISTERED._methods, name, score)
    case = Case(3, 20, 6, dtype, name, step=0)
    up = case.inputs()[1]
    by_hand = reference.topk_mask(up if signed else up.abs(), 6)
    assert torch.equal(masks(case), by_hand)
    for other in SCORES:
        assert not torch.equal(replace(case, score=other).mask(), by_hand)


def test_an_activation_that_no_kernel_knows_is_not_theirs() -> None:
    """It computed ReLU."""
    gate, up, _ = Case().inputs()
    assert fused.supports(gate, up, torch.nn.functional.silu)
    assert not fused.supports(gate, up, torch.nn.functional.softplus)


@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients_of_every_activation(dtype: torch.dtype, activation: str) -> None:
    check(Case(dtype=dtype, activation=activation))


@pytest.mark.usefixtures("several_rows_a_program")
@pytest.mark.parametrize(
    "case",
    [
        Case(7, 20, 6, in_order=True),
        Case(7, 20, 6, in_order=True, packed=True, normalize=False),
        Case(7, 20, 6, packed=True, keep="mask"),
        Case(7, 20, 6, normalize=False),
        Case(7, 20, 6, weights="all"),
        Case(7, 20, 6, weights="all", normalize=False, activation="sigmoid"),
        Case(7, 20, 6, keep="all"),
        Case(7, 20, 6, weights=None, keep="all", dtype=torch.bfloat16),
        Case(7, 20, 6, weights=None, packed=True, dtype=torch.bfloat16),
        Case(7, 20, 20, weights=None, packed=True),
        Case(5, 20, 6, weights=None, scale_dtype=None),
        Case(5, 20, 6, scale_dtype=torch.bfloat16, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_variants(case: Case) -> None:
    check(case)


def test_packed_and_full_mode_have_the_same_gradients() -> None:
    case = Case(3, 24, 6, dtype=torch.bfloat16)
    full = run(case)
    for name, value in run(replace(case, packed=True)).items():
        assert torch.equal(value, full[name]), name


@pytest.mark.parametrize("neurons", [1, 33, 8191])
def test_any_width(neurons: int) -> None:
    case = Case(1, neurons, max(1, neurons // 4), dtype=torch.bfloat16, packed=True, step=0)
    assert check(case)["kept"].sum() == case.k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    case = Case(6, 20, 5, dtype, "signed_gate", "relu", odd=(math.inf, -math.inf, -0.0))
    assert torch.equal(masks(case), case.mask())
    case = replace(case, odd=(math.nan,), seed=4)
    mask = masks(case)
    gate = case.inputs()[0]
    assert torch.equal(mask, case.mask())
    assert torch.equal(mask.any(-1), ~gate.isnan().any(-1))
    assert 0 < int(mask.any(-1).sum()) < 6
    results = run(replace(case, weights=None))
    assert torch.equal(results["hidden"].isnan(), (gate * case.inputs()[1]).isnan())


# Rows whose K-th largest score is far below the largest are searched for everywhere.
FAR = [1.0, 2.0**-30, 2.0**-31, 2.0**-60, 2.0**-100, 0.0, -(2.0**-100), -(2.0**-30), -8.0]
ROWS = {
    "all equal": [0.75],
    "all zero, of both signs": [0.0, -0.0],
    "denormal": [2.0**-130, 2.0**-131, -(2.0**-131), 0.0],
    "far apart": FAR,
    "infinite, and far apart": [*FAR, math.inf, -math.inf],
    "below zero": [-1.0, -2.0, -3.0, -math.inf],
    "of both signs": [-1.0, 1.0, -2.0, 2.0, 0.5],
    "NaN at times": [1.0] * 60 + [2.0, math.nan],
    "the largest number of bf16": [3.3895313892515355e38, -3.3895313892515355e38, 1.0],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_few_values(dtype: torch.dtype, row: str) -> None:
    """Most tie at the threshold; K from 1 to all, odd and even widths, rows that lie apart."""
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor(ROWS[row], dtype=torch.float64).to(dtype)
    for neurons in (33, 64):
        for k in (1, 2, neurons // 4, neurons - 1, neurons):
            chosen = torch.randint(len(values), (3, 2 * neurons), generator=generator)
            scores = values[chosen].to(DEVICE)[:, neurons:]
            assert not scores.is_contiguous()
            assert torch.equal(fused.topk_mask(scores, k), reference.topk_mask(scores, k)), k


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_every_score_of_odd_values(dtype: torch.dtype, score: str, step: float) -> None:
    tiny = 2.0**-130
    odd = (math.inf, -math.inf, -0.0, tiny, -tiny, 1e-20, -90.0, 90.0)
    for neurons, k in ((31, 1), (31, 7), (64, 16), (64, 63)):
        case = Case(3, neurons, k, dtype, score, "relu", step=step, odd=odd, seed=k)
        assert torch.equal(masks(case), case.mask()), k


def test_no_rows() -> None:
    for weights in ("selected", None):
        results = run(Case(0, weights=weights))
        assert results["hidden"].shape == results["d gate"].shape == (0, 37)
        assert weights is None or results["sums"].eq(0).all()


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_backpropagates_alone(which: int) -> None:
    case = Case(3, 20, 5)
    gradients = []
    gate, up, scale = case.inputs()
    for kernels in (True, False):
        leaf = gate.detach().clone().requires_grad_()
        keep, sums = TopK(5, case.score), case.sums()
        if kernels:
            outputs = fused.fused_glu(
                leaf,
                up,
                scale,
                keep,
                activate=ACTIVATIONS["silu"].function,
                packed=None,
                sums=sums,
            )
        else:
            outputs = (
                reference.selected_glu(leaf, up, case.mask(), scale),
                *reference.weight_sums(leaf, case.mask(), sums),
            )
        gradients.append(torch.autograd.grad(outputs[which].square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_the_same_sums_each_time() -> None:
    case = Case(9, 20, 5, in_order=True, step=0)
    first, second = run(case), run(case)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_mode_saves_a_third_or_less(dtype: torch.dtype) -> None:
    sizes = []
    for packed in (False, True):
        gate, up, _ = Case(4, 64, 16, dtype).inputs()
        gate_up = torch.cat([gate, up], dim=-1).requires_grad_()
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        gate, up = (gate_up * 1).chunk(2, dim=-1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fused.fused_glu(
                gate,
                up,
                None,
                TopK(16, "abs_activation"),
                activate=ACTIVATIONS["silu"].function,
                packed=Packed(16) if packed else None,
                sums=None,
            )
        sizes.append(sum(storages.values()))
    element = torch.finfo(dtype).bits // 8
    assert sizes == [4 * (2 * 64 * element + 8), 4 * (2 * 16 * element + 8)]
    assert sizes[0] / sizes[1] >= 3.5


# Without shrinking, which takes minutes in the interpreter.
QUICK = settings(max_examples=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])
TIED = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 7.0, math.inf, -math.inf, math.nan])


@QUICK
@given(
    rows=st.integers(1, 3),
    neurons=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    data=st.data(),
)
def test_topk_mask_of_awkward_scores(
    rows: int, neurons: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, neurons))
    numbers = TIED | st.floats(-100, 100, width=16, allow_subnormal=False)
    values = data.draw(st.lists(numbers, min_size=rows * neurons, max_size=rows * neurons))
    scores = torch.tensor(values, device=DEVICE).view(rows, neurons).to(dtype)
    assert torch.equal(fused.topk_mask(scores, k), reference.topk_mask(scores, k))


@QUICK
@given(
    rows=st.integers(1, 4),
    neurons=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    score=st.sampled_from(SCORES),
    activation=st.sampled_from(FUSED),
    weights=st.sampled_from(["selected", "all", None]),
    flags=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_any_shape_and_setting(
    rows: int,
    neurons: int,
    dtype: torch.dtype,
    score: str,
    activation: str,
    weights: Literal["selected", "all"] | None,
    flags: tuple[bool, bool],
    data: st.DataObject,
) -> None:
    check(
        Case(
            rows,
            neurons,
            data.draw(st.integers(1, neurons)),
            dtype,
            score,
            activation,
            packed=flags[0] and weights != "all",
            weights=weights,
            normalize=flags[1],
            seed=data.draw(st.integers(0, 1000)),
        )
    )
