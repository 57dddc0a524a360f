"""Sparse experts for few tokens against the reference, on every layout, score and dtype."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mone_megatron.kernels import reference
from mone_megatron.kernels.decode import (
    ExpertWeights,
    linear_by_blocks,
    sparse_experts,
    speed_limit,
)
from mone_megatron.kernels.reference import Activate, TopK
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.scores import SCORES as REGISTERED

# Those that a kernel can be asked for: they read nothing but gate and up.
SCORES = [score.name for score in REGISTERED if "down_norm" not in score.reads]


def dense_experts(
    tokens_NH: Tensor,
    experts_NK: Tensor,
    probs_NK: Tensor,
    weights: ExpertWeights,
    keep: TopK,
    activate: Activate = F.silu,
) -> Tensor:
    """Token by token, expert by expert, all neurons computed and a mask applied."""
    output_NH = torch.zeros_like(tokens_NH)
    for token, (experts, probs) in enumerate(zip(experts_NK.tolist(), probs_NK, strict=True)):
        for expert, prob in zip(experts, probs, strict=True):
            gate_F = weights.gate_EFH[expert] @ tokens_NH[token]
            up_F = weights.up_EFH[expert] @ tokens_NH[token]
            mask_TF = reference.kept_mask(gate_F[None], up_F[None], keep, activate)
            hidden_TF = reference.selected_glu(
                gate_F[None], up_F[None], mask_TF, prob[None], activate
            )
            output_NH[token] += hidden_TF[0] @ weights.down_EFH[expert]
    return output_NH


def layer(
    *, experts: int, neurons: int, hidden: int, layout: str, dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(experts * neurons + hidden)
    shape = (experts, neurons, hidden)
    gate, up, down = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if layout == "ours":
        both = torch.stack([gate, up], dim=1)
        gate, up = both[:, 0], both[:, 1]
    elif layout == "concatenated":
        gate, up = torch.cat([gate, up], dim=1).chunk(2, dim=1)
    elif layout == "interleaved":
        both = torch.stack([gate, up], dim=2).flatten(1, 2)
        gate, up = both[:, ::2], both[:, 1::2]
    return ExpertWeights(gate, up, down)


def routed(tokens: int, chosen: int, weights: ExpertWeights, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    experts, _, hidden = weights.gate_EFH.shape
    dtype = weights.gate_EFH.dtype
    tokens_NH = torch.randn(tokens, hidden, generator=generator).to(dtype)
    experts_NK = torch.stack(
        [torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]
    )
    return tokens_NH, experts_NK, torch.rand(tokens, chosen, generator=generator).to(dtype)


@given(
    tokens=st.integers(1, 6),
    experts=st.integers(1, 6),
    neurons=st.integers(1, 24),
    hidden=st.sampled_from([1, 3, 8, 20]),
    layout=st.sampled_from(["apart", "ours", "concatenated", "interleaved"]),
    score=st.sampled_from(SCORES),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_reference(
    tokens: int, experts: int, neurons: int, hidden: int, layout: str, score: str, seed: int
) -> None:
    chooser = random.Random(seed)
    weights = layer(experts=experts, neurons=neurons, hidden=hidden, layout=layout)
    inputs = routed(tokens, chooser.randint(1, experts), weights, seed)
    keep = TopK(chooser.randint(1, neurons), score)
    expected = dense_experts(*inputs, weights, keep)
    torch.testing.assert_close(
        sparse_experts(*inputs, weights, keep), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "relu2"])
def test_other_activations(activation: str) -> None:
    # Of ReLU's scores many are zero: ties go to the lowest index.
    weights = layer(experts=4, neurons=32, hidden=16, layout="ours")
    inputs = routed(3, 2, weights, seed=3)
    keep, activate = TopK(24, "abs_activation"), ACTIVATIONS[activation].function
    expected = dense_experts(*inputs, weights, keep, activate)
    ours = sparse_experts(*inputs, weights, keep, activate)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_bf16() -> None:
    weights = layer(experts=4, neurons=32, hidden=64, layout="concatenated", dtype=torch.bfloat16)
    inputs = routed(3, 2, weights, seed=3)
    keep = TopK(8, "abs_activation")
    ours = sparse_experts(*inputs, weights, keep)
    assert ours.dtype is torch.bfloat16
    expected = dense_experts(*inputs, weights, keep)
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.5)
    # The kept neurons decide, not how they are added: another selection is far away.
    other = dense_experts(*inputs, weights, TopK(7, "abs_activation"))
    assert (ours - expected).abs().max() * 4 < (other - expected).abs().max()


def test_rows_of_other_neurons_are_not_read() -> None:
    weights = layer(experts=4, neurons=32, hidden=16, layout="ours")
    tokens_NH, experts_NK, probs_NK = routed(1, 2, weights, seed=5)
    keep = TopK(8, "abs_activation")
    expected = sparse_experts(tokens_NH, experts_NK, probs_NK, weights, keep)
    for expert in range(4):
        gate_1F = tokens_NH @ weights.gate_EFH[expert].T
        mask_1F = reference.kept_mask(gate_1F, gate_1F, keep, F.silu)
        assert mask_1F is not None
        unread = ~mask_1F[0] if expert in experts_NK else torch.ones(32, dtype=torch.bool)
        weights.up_EFH[expert, unread] = torch.nan
        weights.down_EFH[expert, unread] = torch.nan
    assert torch.equal(sparse_experts(tokens_NH, experts_NK, probs_NK, weights, keep), expected)


def test_a_nan_spreads_to_its_token_only() -> None:
    weights = layer(experts=4, neurons=32, hidden=16, layout="ours")
    tokens_NH, experts_NK, probs_NK = routed(3, 2, weights, seed=5)
    tokens_NH[1, 0] = torch.nan
    output = sparse_experts(tokens_NH, experts_NK, probs_NK, weights, TopK(8, "abs_activation"))
    assert output[1].isnan().all()
    assert not output[[0, 2]].isnan().any()


def test_rows_that_are_not_contiguous_are_refused() -> None:
    weights = layer(experts=2, neurons=8, hidden=4, layout="apart")
    transposed = weights.down_EFH.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="down projection: rows of neurons are not contiguous"):
        ExpertWeights(weights.gate_EFH, weights.up_EFH, transposed)


@pytest.mark.parametrize(
    ("tokens", "keep_ratio", "limit"),
    [(1, 0.125, 2.40), (1, 0.25, 2.00), (4, 0.25, 1.90), (16, 0.125, 1.99), (64, 0.5, 1.01)],
)
def test_speed_limit_for_64_experts_of_which_8(
    tokens: int, keep_ratio: float, limit: float
) -> None:
    measured = speed_limit(tokens, experts=64, chosen=8, keep_ratio=keep_ratio)
    assert measured == pytest.approx(limit, abs=0.005)


def test_speed_limit_by_counting() -> None:
    # The share of matrices and rows that any token touches, counted over random choices.
    generator = torch.Generator().manual_seed(0)
    tokens, experts, chosen, neurons, kept = 5, 16, 4, 32, 8
    matrices = rows = 0
    for _ in range(200):
        touched = torch.zeros(experts, neurons + 1, dtype=torch.bool)
        for _ in range(tokens):
            for expert in torch.randperm(experts, generator=generator)[:chosen]:
                touched[expert, torch.randperm(neurons, generator=generator)[:kept]] = True
                touched[expert, neurons] = True
        matrices += int(touched[:, neurons].sum()) * neurons
        rows += int(touched[:, :neurons].sum())
    counted = 3 * matrices / (matrices + 2 * rows)
    expected = speed_limit(tokens, experts=experts, chosen=chosen, keep_ratio=kept / neurons)
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "score", "activation", "layout", "kept"),
    [
        (1, "abs_activation", "silu", "ours", 8),
        (3, "signed_gate", "silu", "concatenated", 5),
        (2, "abs_product", "silu", "interleaved", 9),
        (2, "abs_gate", "relu2", "apart", 1),
        (2, "abs_activation", "relu", "ours", 30),
        (1, "abs_activation", "sigmoid", "ours", 37),
    ],
)
def test_triton(
    tokens: int, score: str, activation: str, layout: str, kept: int, dtype: torch.dtype
) -> None:
    fused_decode = pytest.importorskip(
        "mone_megatron.kernels.fused_decode", reason="Triton is not installed"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # 37 neurons and 150 values fill no block.
    weights = layer(experts=4, neurons=37, hidden=150, layout=layout, dtype=dtype)
    inputs = routed(tokens, 2, weights, seed=kept)
    keep, activate = TopK(kept, score), ACTIVATIONS[activation].function
    on_device = [tensor.to(device) for tensor in (*inputs, *vars(weights).values())]
    ours = fused_decode.sparse_experts(*on_device, keep, activate).cpu()
    assert ours.dtype is dtype
    expected = dense_experts(*inputs, weights, keep, activate)
    scale = float(expected.abs().max())
    tolerance = 1e-5 * scale if dtype is torch.float32 else 0.03 * scale
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_reads_no_other_rows_and_spreads_nan() -> None:
    fused_decode = pytest.importorskip(
        "mone_megatron.kernels.fused_decode", reason="Triton is not installed"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = layer(experts=4, neurons=40, hidden=64, layout="ours")
    tokens_NH, experts_NK, probs_NK = routed(2, 2, weights, seed=2)
    keep = TopK(8, "abs_activation")

    def run() -> Tensor:
        tensors = (tokens_NH, experts_NK, probs_NK, *vars(weights).values())
        on_device = [tensor.to(device) for tensor in tensors]
        output: Tensor = fused_decode.sparse_experts(*on_device, keep, F.silu).cpu()
        return output

    expected = run()
    read = torch.zeros(4, 40, dtype=torch.bool)
    for token, experts in enumerate(experts_NK.tolist()):
        for expert in experts:
            gate_1F = tokens_NH[token : token + 1] @ weights.gate_EFH[expert].T
            mask_1F = reference.kept_mask(gate_1F, gate_1F, keep, F.silu)
            assert mask_1F is not None
            read[expert] |= mask_1F[0]
    weights.up_EFH[~read] = torch.nan
    weights.down_EFH[~read] = torch.nan
    assert torch.equal(run(), expected)
    tokens_NH[1, 3] = torch.nan
    output = run()
    assert output[1].isnan().all()
    assert torch.equal(output[0], expected[0])


@pytest.mark.parametrize("neurons", [1, 7, 12, 64])
@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_of_rows_multiply_as_the_whole(neurons: int, tokens: int) -> None:
    """Also of a weight whose rows lie between others'."""
    both_FH = torch.randn(2 * neurons, 5, generator=torch.Generator().manual_seed(0))
    tokens_NH = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1))
    for weight_FH in (both_FH[:neurons], both_FH[::2]):
        expected_NF = F.linear(tokens_NH, weight_FH)
        torch.testing.assert_close(linear_by_blocks(tokens_NH, weight_FH), expected_NF)
