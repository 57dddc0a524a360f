"""Every neuron loss against a loop over tokens, experts and neurons in plain numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from own_methods import own_names
from test_each_rule import problems
from torch import Tensor

from mone_megatron.kernels.reference import segment_matrix, topk_mask
from mone_megatron.methods.loss import SelectionSums
from mone_megatron.methods.losses import LOSSES
from mone_megatron.mone.balance import neuron_weights
from mone_megatron.testing.launch import run_layouts

TOKENS, NEURONS, EXPERTS, KEPT = 11, 6, 3, 2


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Activations, which neurons are kept, and the expert of each token; the last has none."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(TOKENS, NEURONS, generator=generator, dtype=torch.float64)
    activation = torch.nn.functional.silu(gate)
    return activation, topk_mask(activation.abs(), KEPT), torch.arange(TOKENS) % (EXPERTS - 1)


def computed(name: str, activation: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    loss = LOSSES[name]
    segment_ST = segment_matrix(index, EXPERTS)
    weights_TF = neuron_weights(
        activation_TF=activation, mask_TF=mask, weights="selected",
        normalize=loss.normalized is not False, signed=loss.signed,
    )  # fmt: skip
    return loss.function(
        SelectionSums(
            weight_sum_SF=segment_ST.double() @ weights_TF.double(),
            kept_SF=segment_ST @ mask.float(),
            tokens_S=segment_ST.sum(-1),
            kept_share=KEPT / NEURONS,
            num_experts=EXPERTS,
            neurons=NEURONS,
        )
    )


@pytest.mark.parametrize("name", [name for name in own_names(LOSSES) if LOSSES[name].slope])
def test_slopes_are_the_gradients(name: str) -> None:
    loss = LOSSES[name]
    assert loss.linear
    assert loss.slope is not None
    activation, mask, index = inputs()
    segment_ST = segment_matrix(index, EXPERTS)
    weight_sum_SF = (segment_ST @ (activation.float() * mask).abs()).requires_grad_()
    kept_SF, tokens_S = segment_ST @ mask.float(), segment_ST.sum(-1)
    sums = SelectionSums(weight_sum_SF, kept_SF, tokens_S, KEPT / NEURONS, EXPERTS, NEURONS)
    (gradient,) = torch.autograd.grad(loss.function(sums), weight_sum_SF)
    slope_SF = loss.slope(sums)
    assert not slope_SF.requires_grad
    torch.testing.assert_close(slope_SF, gradient)
    torch.testing.assert_close((slope_SF * weight_sum_SF).sum(), loss.function(sums))


def expected(name: str, activation: Tensor, mask: Tensor, index: Tensor) -> float:
    total = 0.0
    for expert in range(EXPERTS):
        tokens = [t for t in range(TOKENS) if index[t] == expert]
        if not tokens:
            continue
        load, mean = [0.0] * NEURONS, [0.0] * NEURONS
        for t in tokens:
            kept = [k for k in range(NEURONS) if mask[t, k]]
            size = sum(abs(float(activation[t, k])) for k in kept)
            for k in kept:
                weight = float(activation[t, k])
                if name != "signed":
                    weight = abs(weight) / size
                load[k] += NEURONS / KEPT / len(tokens)
                mean[k] += weight / len(tokens)
        if name in ("switch", "signed"):
            total += sum(f * p for f, p in zip(load, mean, strict=True))
        elif name == "entropy":
            entropy = -sum(p * math.log(p) for p in mean if p > 0)
            total += 1 - entropy / math.log(NEURONS)
        else:
            assert name == "z", "a loss without a reference"
            total += sum(math.log(NEURONS * p + 0.001) ** 2 for p in mean) / NEURONS
    return total / EXPERTS


@pytest.mark.parametrize("name", own_names(LOSSES))
def test_it_is_what_its_formula_says(name: str) -> None:
    found = computed(name, *inputs())
    assert found.item() == pytest.approx(expected(name, *inputs()), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES.names)
def test_its_slope_is_that_of_small_steps(name: str) -> None:
    activation, mask, index = inputs()
    leaf = activation.clone().requires_grad_()
    (slope,) = torch.autograd.grad(computed(name, leaf, mask, index), leaf)
    direction = torch.randn_like(activation)
    step = 1e-3 * direction
    # The mask, and so the load, stays as it is.
    up, down = (computed(name, activation + s, mask, index) for s in (step, -step))
    assert float((slope * direction).sum()) == pytest.approx(
        float(up - down) / 2e-3, rel=2e-2, abs=1e-5
    )


def test_even_weights_are_the_least_that_the_forms_know() -> None:
    """Each neuron kept as often as others, with equal weights."""
    index = torch.zeros(3, dtype=torch.int64)
    mask = torch.eye(3).repeat_interleave(2, dim=-1).bool()
    even = torch.ones(3, NEURONS, dtype=torch.float64)
    # The two experts without tokens count 0.
    assert computed("switch", even, mask, index).item() * EXPERTS == pytest.approx(1)
    assert computed("entropy", even, mask, index).item() == pytest.approx(0, abs=1e-6)
    assert computed("z", even, mask, index).item() == pytest.approx(0, abs=1e-6)
    one = torch.zeros(3, NEURONS).bool()
    one[:, 0] = True
    assert computed("entropy", even, one, index).item() * EXPERTS == pytest.approx(1)


def test_the_signed_form_can_fall_below_zero() -> None:
    activation, mask, index = inputs()
    assert computed("signed", -activation.abs(), mask, index).item() < 0


RUN = (
    "experiment=tiny_mone", "device=cpu", "data.max_megabytes=0.2", "train.steps=3",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.wandb.mode=disabled", "logging.report=false", "logging.progress=none",
    "mone.balance.coeff=0.05",
)  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_that_are_not_linear_agree_where_a_microbatch_is_split(tmp_path: Path) -> None:
    """With whole experts on tensor-parallel ranks each sees a part of an expert's tokens."""
    names = [loss.name for loss in LOSSES if not loss.linear]
    one = {name: (*RUN, f"mone.balance.kind={name}") for name in names}
    two = {f"{name}-tp2": (*one[name], "parallel.tensor=2") for name in names}
    run_layouts(one, processes=1, folder=tmp_path)
    run_layouts(two, processes=2, folder=tmp_path)
    for name in names:
        pairs = zip(records(tmp_path / name), records(tmp_path / f"{name}-tp2"), strict=True)
        for whole, split in pairs:
            assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            for key in ("grad_norm", "mone/balance_loss"):
                assert split[key] == pytest.approx(whole[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=entropy", "normalize=false"], "mone.balance.normalize: false with mone.balance"),
        (["kind=signed"], "mone.balance.normalize: true with mone.balance.kind=signed"),
        (["kind=zz"], "mone.balance.kind: the text 'zz' is not one of entropy, signed, switch, z"),
    ],
)
def test_weights_that_a_loss_is_not_of_are_refused(overrides: list[str], message: str) -> None:
    if "kind=zz" in overrides:
        with pytest.raises(ValueError, match=message):
            list(problems(*(f"mone.balance.{override}" for override in overrides)))
        return
    (found,) = problems(*(f"mone.balance.{override}" for override in overrides))
    assert found.startswith(message)


def test_signed_weights_are_refused_in_packed_memory() -> None:
    (found,) = problems(
        "mone.balance.kind=signed", "mone.balance.normalize=false", "mone.memory=packed"
    )
    assert found.startswith("mone.memory: packed saves nothing with mone.balance.kind=signed")
