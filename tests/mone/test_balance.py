from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels.reference import segment_matrix, selected_glu, topk_mask
from mone_megatron.methods.loss import SelectionSums
from mone_megatron.methods.losses import LOSSES
from mone_megatron.mone.balance import (
    NeuronBalance,
    neuron_weights,
)
from mone_megatron.mone.neurons import (
    NEURON_BALANCE_LOSS,
    NeuronGate,
    NeuronSettings,
    Segments,
)
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.parallel.megatron_compat.auxiliary_losses import (
    forget_layer_losses,
    layer_losses,
)
from mone_megatron.testing.processes import Processes

Weights = Literal["selected", "all"]
VARIANTS = [(weights, normalize) for weights in ("selected", "all") for normalize in (True, False)]


def balance_loss(
    activation: Tensor,
    mask: Tensor,
    index: Tensor,
    experts: int,
    *,
    weights: Weights = "selected",
    normalize: bool = True,
    load: Tensor | None = None,
) -> Tensor:
    """The loss of whole rows on one rank, as :class:`NeuronGate` puts it together.

    ``load`` overrides how many tokens keep each neuron, to hold f_k constant.
    """
    segment_ST = segment_matrix(index, experts)
    weights_TF = neuron_weights(
        activation_TF=activation, mask_TF=mask, weights=weights, normalize=normalize
    )
    sums = SelectionSums(
        neurons=mask.shape[-1],
        weight_sum_SF=segment_ST @ weights_TF,
        kept_SF=segment_ST @ mask.float() if load is None else load,
        tokens_S=segment_ST.sum(-1),
        kept_share=mask[0].sum().item() / mask.shape[-1],
        num_experts=experts,
    )
    return LOSSES["switch"].function(sums)


def loop_over_tokens(
    activation: Tensor,
    mask: Tensor,
    index: Tensor,
    experts: int,
    *,
    weights: Weights,
    normalize: bool,
) -> tuple[float, Tensor]:
    """Value, and gradient with respect to the activation, by the formulas of the method.

    With ``w`` the weights of token t in expert e of T tokens and ``s`` their sum,
    dL/da_j = sign(a_j) (f_j - sum_k f_k w_k) / (s T E), or sign(a_j) f_j / (T E) when raw, for
    the neurons that have a weight.
    """
    neurons, kept = mask.shape[-1], int(mask[0].sum())
    total, gradient = 0.0, torch.zeros_like(activation)
    for expert in range(experts):
        rows = [t for t in range(len(index)) if index[t] == expert]
        if not rows:
            continue
        f = [
            sum(bool(mask[t, k]) for t in rows) / len(rows) * neurons / kept for k in range(neurons)
        ]
        for t in rows:
            counted = [k for k in range(neurons) if weights == "all" or mask[t, k]]
            size = sum(abs(activation[t, k].item()) for k in counted) if normalize else 1.0
            w = {k: abs(activation[t, k].item()) / size for k in counted}
            mean = sum(f[k] * w[k] for k in counted)
            total += mean / len(rows) / experts
            for k in counted:
                sign = 1.0 if activation[t, k] > 0 else -1.0
                slope = f[k] - mean if normalize else f[k]
                gradient[t, k] = sign * slope / (size * len(rows) * experts)
    return total, gradient


def _case(rows: int = 14, neurons: int = 12, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, mask and expert of each row; expert 2 of 4 is empty."""
    generator = torch.Generator().manual_seed(5)
    activation = F.silu(torch.randn(rows, neurons, generator=generator))
    index = torch.tensor([0, 1, 3])[torch.randint(0, 3, (rows,), generator=generator)]
    return activation, topk_mask(activation.abs(), k), index


@pytest.mark.parametrize(("weights", "normalize"), VARIANTS)
def test_value_and_gradient_match_the_closed_form(weights: Weights, normalize: bool) -> None:
    activation, mask, index = _case()
    activation.requires_grad_()
    loss = balance_loss(activation, mask, index, 4, weights=weights, normalize=normalize)
    (gradient,) = torch.autograd.grad(loss, activation)
    value, expected = loop_over_tokens(
        activation.detach(), mask, index, 4, weights=weights, normalize=normalize
    )
    assert loss.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("weights", "normalize"), VARIANTS)
def test_gradient_matches_finite_differences_with_constant_load(
    weights: Weights, normalize: bool
) -> None:
    activation, mask, index = _case()
    load = segment_matrix(index, 4) @ mask.float()
    activation.requires_grad_()
    loss = balance_loss(activation, mask, index, 4, weights=weights, normalize=normalize)
    (gradient,) = torch.autograd.grad(loss, activation)
    direction = torch.randn(activation.shape, generator=torch.Generator().manual_seed(1))
    # Away from the kinks of |a|.
    direction = direction.where(activation.detach().abs() > 0.01, 0.0)
    epsilon = 1e-3
    ends = [
        balance_loss(
            activation.detach() + sign * epsilon * direction,
            mask,
            index,
            4,
            weights=weights,
            normalize=normalize,
            load=load,
        )
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * epsilon)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 3])
def test_one_when_even(experts: int) -> None:
    # Every expert keeps each of its 8 neurons once over 4 rows of 2, all with equal weight.
    mask = torch.eye(4).repeat_interleave(2, dim=-1).bool().repeat(experts, 1)
    index = torch.arange(experts).repeat_interleave(4)
    activation = torch.full((4 * experts, 8), -0.3)
    assert balance_loss(activation, mask, index, experts).item() == pytest.approx(1.0, abs=1e-6)
    # Also over all neurons: sum_k f_k / f = 1.
    over_all = balance_loss(activation, mask, index, experts, weights="all")
    assert over_all.item() == pytest.approx(1.0, abs=1e-6)
    # Raw weights shrink with the activations; normalised ones do not.
    raw = [
        balance_loss(activation * scale, mask, index, experts, normalize=False).item()
        for scale in (1.0, 0.1)
    ]
    assert raw[0] == pytest.approx(0.3 * 2)
    assert raw[1] == pytest.approx(0.03 * 2)
    assert balance_loss(activation * 0.1, mask, index, experts).item() == pytest.approx(1.0)


def test_f_over_k_when_all_tokens_keep_the_same() -> None:
    mask = torch.tensor([[True, True, False, False, False, False, False, False]]).repeat(5, 1)
    loss = balance_loss(torch.ones(5, 8), mask, torch.zeros(5, dtype=torch.long), 1)
    assert loss.item() == pytest.approx(4.0)


@st.composite
def exact_masks(draw: st.DrawFn) -> Tensor:
    """Masks with exactly K True in every row."""
    neurons = draw(st.integers(1, 12))
    k = draw(st.integers(1, neurons))
    rows = draw(st.integers(1, 10))
    mask = torch.zeros(rows, neurons, dtype=torch.bool)
    for row in range(rows):
        mask[row, draw(st.permutations(range(neurons)))[:k]] = True
    return mask


@given(mask=exact_masks(), size=st.floats(0.01, 10.0))
def test_at_least_one_with_equal_weights_and_one_only_when_even(mask: Tensor, size: float) -> None:
    rows, neurons = mask.shape
    activation = torch.full(mask.shape, size)
    loss = balance_loss(activation, mask, torch.zeros(rows, dtype=torch.long), 1).item()
    assert loss >= 1 - 1e-5
    counts = mask.sum(0)
    even = bool((counts == counts[0]).all())
    # No uneven load exceeds 1 by less: two neurons kept by one token more and one less.
    excess = 1.0 / (rows * int(mask[0].sum())) ** 2
    assert (loss < 1 + excess / 2) == even or neurons == 1


def test_empty_experts_count_zero_in_the_mean() -> None:
    activation, mask, _ = _case(rows=6)
    index = torch.zeros(6, dtype=torch.long)
    alone = balance_loss(activation, mask, index, 1)
    among_four = balance_loss(activation, mask, index, 4)
    assert among_four.item() == pytest.approx(alone.item() / 4)
    nothing = balance_loss(activation[:1], mask[:1], torch.tensor([7]), 4)
    assert nothing.item() == 0.0


def test_a_token_without_weight_gives_no_nan() -> None:
    activation = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]] * 2)
    loss = balance_loss(activation, mask, torch.zeros(2, dtype=torch.long), 1)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, activation)[0].isfinite().all()


def test_weights_are_fp32_and_sum_to_one() -> None:
    activation, mask, _ = _case()
    weights = neuron_weights(
        activation_TF=activation.bfloat16(), mask_TF=mask, weights="selected", normalize=True
    )
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert (weights[~mask] == 0).all()


# Attached to the activations ----------


def _gate(
    coeff: float,
    *,
    neurons: int = 12,
    experts: int = 3,
    weights: Weights = "selected",
    normalize: bool = True,
    neuron_group: dist.ProcessGroup | None = None,
) -> NeuronGate:
    assert dist.group.WORLD is not None
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    config = TransformerConfig(
        num_layers=3,
        hidden_size=8,
        num_attention_heads=1,
        activation_func=F.silu,
        cuda_graph_scope=[],
    )
    gate = NeuronGate(
        config=config,
        settings=NeuronSettings(
            NeuronSelection(0.25), NeuronBalance(coeff, "switch", weights, normalize)
        ),
        neurons=neurons,
        num_experts=experts,
        num_local_experts=experts,
        first_expert=0,
        neuron_group=neuron_group or alone,
        replica_group=alone,
    )
    gate.layer_number = 2
    return gate.train()


def _gate_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    gates, ups = torch.randn(2, 10, 12, generator=generator)
    return gates, ups, torch.tensor([0] * 4 + [2] * 6)


def _gradient_of_the_loss_alone(coeff: float, scale: float | None) -> Tensor:
    gates, ups, index = _gate_inputs()
    gates.requires_grad_()
    hidden = _gate(coeff)(gates, ups, torch.ones(10), Segments(index, 1, None))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if scale is not None:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
    (gradient,) = torch.autograd.grad(hidden, gates, torch.zeros_like(hidden))
    return gradient


@pytest.mark.usefixtures("one_process")
def test_gradient_is_coeff_times_scale_exactly() -> None:
    unit = _gradient_of_the_loss_alone(1.0, None)
    gates, _, index = _gate_inputs()
    gates.requires_grad_()
    activation = F.silu(gates)
    loss = balance_loss(activation, topk_mask(activation.abs(), 3), index, 3)
    torch.testing.assert_close(unit, torch.autograd.grad(loss, gates)[0])
    assert unit.abs().max() > 0
    # Powers of two, so that the products are exact.
    for coeff, scale in ((1.0, 4.0), (0.5, 1.0), (0.125, 16.0)):
        assert torch.equal(_gradient_of_the_loss_alone(coeff, scale), unit * (coeff * scale))
    assert _gradient_of_the_loss_alone(0.0, 4.0).eq(0).all()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("weights", "normalize"), VARIANTS)
@pytest.mark.parametrize("with_scale", [True, False])
def test_gate_attaches_the_loss_of_the_formulas(
    weights: Weights, normalize: bool, with_scale: bool
) -> None:
    gates, ups, index = _gate_inputs()
    gates.requires_grad_()
    ups.requires_grad_()
    gate = _gate(1.0, weights=weights, normalize=normalize)
    grad = torch.randn(10, 12, generator=torch.Generator().manual_seed(6))
    scale = torch.rand(10, generator=torch.Generator().manual_seed(7)) if with_scale else None
    hidden = gate(gates, ups, scale, Segments(index, 1, None))
    ours = torch.autograd.grad(hidden, (gates, ups), grad)

    activation = F.silu(gates)
    mask = topk_mask(activation.abs(), 3)
    loss = balance_loss(activation, mask, index, 3, weights=weights, normalize=normalize)
    main = selected_glu(gates, ups, mask, scale)
    # In training the gradient of the loss adds to that of everything else.
    expected = torch.autograd.grad((main * grad).sum() + loss, (gates, ups))
    torch.testing.assert_close(hidden, main, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    logged = layer_losses()[NEURON_BALANCE_LOSS][1]
    assert logged.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.usefixtures("one_process")
def test_forward_values_do_not_change_and_the_loss_is_logged_per_layer() -> None:
    gates, ups, index = _gate_inputs()
    segments = Segments(index, 1, None)
    with_loss, without = _gate(0.1), _gate(0.0)
    gates.requires_grad_()
    assert torch.equal(
        with_loss(gates, ups, torch.ones(10), segments),
        without(gates, ups, torch.ones(10), segments),
    )
    activation = F.silu(gates.detach())
    loss = balance_loss(activation, topk_mask(activation.abs(), 3), index, 3)
    logged = layer_losses()[NEURON_BALANCE_LOSS]
    # Without the coefficient, at the layer's place.
    torch.testing.assert_close(logged, torch.tensor([0.0, loss.item(), 0.0]))


@pytest.mark.usefixtures("one_process")
def test_evaluation_and_the_first_forward_of_recomputation_log_nothing() -> None:
    gates, ups, index = _gate_inputs()
    gate = _gate(0.1)
    gate.usage.collecting = True
    with torch.no_grad():
        gate(gates, ups, None, Segments(index, 1, None))
    gate.eval()
    gate(gates.requires_grad_(), ups, None, Segments(index, 1, None))
    assert NEURON_BALANCE_LOSS not in layer_losses()
    assert gate.usage.tokens_E is None


# Over ranks ----------


def _sharded_loss(weights: Weights, normalize: bool) -> tuple[float, Tensor, Tensor]:
    gates, ups, index = _gate_inputs()
    rank, size = dist.get_rank(), dist.get_world_size()
    gate = _gate(1.0, weights=weights, normalize=normalize, neuron_group=dist.group.WORLD)
    gates = gates.chunk(size, dim=-1)[rank].clone().requires_grad_()
    ups = ups.chunk(size, dim=-1)[rank].clone()
    forget_layer_losses()
    hidden = gate(gates, ups, torch.ones(10), Segments(index, 1, None))
    (gradient,) = torch.autograd.grad(hidden, gates, torch.zeros_like(hidden))
    loss = layer_losses()[NEURON_BALANCE_LOSS][1].item()
    return loss, gradient, hidden.detach()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("weights", "normalize"), VARIANTS)
def test_neurons_over_two_ranks_equal_one_rank(
    two_processes: Processes, weights: Weights, normalize: bool
) -> None:
    gates, ups, index = _gate_inputs()
    gates.requires_grad_()
    gate = _gate(1.0, weights=weights, normalize=normalize)
    hidden = gate(gates, ups, torch.ones(10), Segments(index, 1, None))
    (expected,) = torch.autograd.grad(hidden, gates, torch.zeros_like(hidden))
    value = layer_losses()[NEURON_BALANCE_LOSS][1].item()

    by_rank = two_processes.run(_sharded_loss, weights, normalize)
    assert sum(loss for loss, _, _ in by_rank) == pytest.approx(value, rel=1e-6)
    gradient = torch.cat([part for _, part, _ in by_rank], dim=-1)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(torch.cat([part for _, _, part in by_rank], dim=-1), hidden)


def _sharded_weights(weights: Weights, normalize: bool) -> tuple[Tensor, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, mask, _ = _case()
    activation = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    shares = neuron_weights(
        activation_TF=activation,
        mask_TF=mask.chunk(size, dim=-1)[rank],
        weights=weights,
        normalize=normalize,
        neuron_group=dist.group.WORLD,
    )
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(9))
    (gradient,) = torch.autograd.grad(shares, activation, grad.chunk(size, dim=-1)[rank])
    return shares.detach(), gradient


@pytest.mark.parametrize(("weights", "normalize"), VARIANTS)
def test_weights_over_two_ranks_equal_one_rank(
    two_processes: Processes, weights: Weights, normalize: bool
) -> None:
    activation, mask, _ = _case()
    activation.requires_grad_()
    shares = neuron_weights(
        activation_TF=activation, mask_TF=mask, weights=weights, normalize=normalize
    )
    grad = torch.randn(shares.shape, generator=torch.Generator().manual_seed(9))
    (expected,) = torch.autograd.grad(shares, activation, grad)
    by_rank = two_processes.run(_sharded_weights, weights, normalize)
    joined = [torch.cat(parts, dim=-1) for parts in zip(*by_rank, strict=True)]
    torch.testing.assert_close(joined[0], shares.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(joined[1], expected, rtol=1e-5, atol=1e-6)
