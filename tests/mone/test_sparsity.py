"""The sparsity loss: its value and gradient against autograd, in every layout, for MoE and MoNE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import neuron_scores, topk_mask
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.mone.balance import NeuronBalance
from mone_megatron.mone.neurons import NeuronGate, NeuronSettings, Segments
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.mone.sparsity import SPARSITY_LOSS, Sparsity
from mone_megatron.parallel.megatron_compat.auxiliary_losses import layer_losses
from mone_megatron.testing.launch import run_layouts
from mone_megatron.testing.layouts import LAYOUTS

ROWS, NEURONS, EXPERTS, TOKENS = 10, 16, 3, 5
Memory = Literal["full", "packed"]


def make_gate(
    sparsity: Sparsity | None, *, score: str | None, memory: Memory, balance: float
) -> NeuronGate:
    alone = dist.new_group([0])
    settings = None
    if score is not None:
        selection = NeuronSelection(0.25, score)
        settings = NeuronSettings(selection, NeuronBalance(balance), memory)
    gate = NeuronGate(
        config=TransformerConfig(
            num_layers=3,
            hidden_size=8,
            num_attention_heads=1,
            activation_func=F.silu,
            cuda_graph_scope=[],
        ),
        settings=settings,
        neurons=NEURONS,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        first_expert=0,
        neuron_group=alone,
        replica_group=alone,
        sparsity=sparsity,
    )
    gate.layer_number = 2
    return gate.train()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, the router's probabilities, a down projection, and the expert of each row."""
    generator = torch.Generator().manual_seed(2)
    gate, up = torch.randn(2, ROWS, NEURONS, generator=generator)
    scale = torch.rand(ROWS, generator=generator)
    scale[3] = 0.0  # a probability that has vanished
    down = torch.randn(NEURONS, 4, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (gate, up, scale, down)]
    # One expert has no tokens.
    return (*leaves, torch.tensor([0] * 4 + [2] * 6))  # type: ignore[return-value]


def l1(hidden: Tensor) -> Tensor:
    return hidden.abs().sum() / TOKENS


CASES = {
    "moe": (None, "full", 0.0),
    "mone": ("abs_activation", "full", 0.0),
    "mone_by_gate": ("abs_gate", "full", 0.0),
    "mone_balanced": ("abs_product", "full", 0.5),
    "mone_packed": ("abs_activation", "packed", 0.0),
    "mone_packed_balanced": ("abs_gate", "packed", 0.5),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_autograd(case: str, kernels: str) -> None:
    score, memory, balance = CASES[case]
    gate, up, scale, down, index = inputs()
    ops.use_kernels(kernels)  # type: ignore[arg-type]
    try:
        results = []
        for sparsity in (None, Sparsity("l1", 0.25, TOKENS)):
            module = make_gate(sparsity, score=score, memory=memory, balance=balance)  # type: ignore[arg-type]
            segments = Segments(index, 1, None, in_order=True)
            output = module(gate, up, scale, segments, lambda hidden: hidden @ down)
            grads = torch.autograd.grad(output.square().sum(), (gate, up, scale, down))
            results.append((output, *grads))
    finally:
        ops.use_kernels("auto")
    hidden = F.silu(gate) * up
    if score is not None:
        scores = neuron_scores(gate, up, score, F.silu).detach()
        hidden = hidden * topk_mask(scores, NEURONS // 4)
    expected = l1(hidden)
    found = layer_losses()[SPARSITY_LOSS]
    torch.testing.assert_close(found, torch.tensor([0.0, float(expected.detach()), 0.0]))
    (plain, *before), (output, *after) = results
    torch.testing.assert_close(output, plain)
    added = torch.autograd.grad(0.25 * expected, (gate, up))
    # Scale and down have no part in it, also where a probability is 0.
    for one, other, extra in zip(before, after, (*added, 0, 0), strict=True):
        torch.testing.assert_close(other, one + extra)


@pytest.mark.usefixtures("one_process")
def test_without_a_coefficient_it_is_only_logged() -> None:
    gate, up, scale, down, index = inputs()
    outputs = []
    for sparsity in (None, Sparsity("l1", 0.0, TOKENS)):
        module = make_gate(sparsity, score="abs_activation", memory="full", balance=0.0)
        output = module(gate, up, scale, Segments(index, 1, None), lambda hidden: hidden @ down)
        outputs.append((output, *torch.autograd.grad(output.sum(), (gate, up, scale, down))))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(other, one)
    assert layer_losses()[SPARSITY_LOSS][1] > 0


@pytest.mark.usefixtures("one_process")
def test_gradient_scales_with_the_loss() -> None:
    gate, up, scale, _, index = inputs()

    def gradient(coeff: float, loss_scale: float) -> Tensor:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(loss_scale))
        module = make_gate(Sparsity("l1", coeff, TOKENS), score=None, memory="full", balance=0.0)
        output = module(gate, up, scale, Segments(index, 1, None))
        return torch.autograd.grad(output, gate, torch.zeros_like(output))[0]

    unit = gradient(1.0, 1.0)
    assert unit.abs().max() > 0
    # Powers of two, so that the products are exact.
    for coeff, loss_scale in ((1.0, 4.0), (0.5, 1.0), (0.125, 16.0)):
        assert torch.equal(gradient(coeff, loss_scale), unit * (coeff * loss_scale))


RUN = (
    "device=cpu", "data.max_megabytes=0.2", "train.steps=3", "logging.wandb.mode=disabled",
    "model.num_layers=2", "train.global_batch_size=4",
    "logging.report=false", "logging.progress=none", "model.sparsity_coeff=0.003",
)  # fmt: skip
ON_TWO = ("ep2", "tp2_etp2", "tp2_ep1_etp1", "pp2", "etp2_tp1")
LOSSES = [loss.name for loss in SPARSITY_LOSSES if loss.function is not None]


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsity")
    one: dict[str, tuple[str, ...]] = {}
    two: dict[str, tuple[str, ...]] = {}
    for name in ("tiny_moe", "tiny_mone"):
        experiment = f"experiment={name}"
        one[f"{name}-none"] = (experiment, *RUN, "model.sparsity_coeff=0")
        for loss in LOSSES:
            chosen = (experiment, *RUN, f"model.sparsity_loss={loss}")
            one[f"{name}-{loss}-one"] = chosen
            two |= {f"{name}-{loss}-{layout}": (*chosen, *LAYOUTS[2][layout]) for layout in ON_TWO}
        one[f"{name}-recompute"] = (*chosen, "train.recompute=full")
    one["tiny_mone-packed"] = (*chosen, "mone.memory=packed")
    run_layouts(one, processes=1, folder=folder)
    run_layouts(two, processes=2, folder=folder)
    return folder


@pytest.mark.parametrize("layout", ON_TWO)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("experiment", ["tiny_moe", "tiny_mone"])
def test_layouts_agree(runs: Path, experiment: str, loss: str, layout: str) -> None:
    expected = records(runs / f"{experiment}-{loss}-one")
    for one, record in zip(expected, records(runs / f"{experiment}-{loss}-{layout}"), strict=True):
        for key in ("loss", "grad_norm", "experts/sparsity_loss", "experts/sparsity_loss/layer_2"):
            if key in one:
                assert record[key] == pytest.approx(one[key], rel=2e-5), key


@pytest.mark.parametrize("experiment", ["tiny_moe", "tiny_mone"])
def test_it_makes_hidden_values_smaller_and_is_named_in_the_metrics(
    runs: Path, experiment: str
) -> None:
    without, having = records(runs / f"{experiment}-none"), records(runs / f"{experiment}-l1-one")
    assert "experts/sparsity_loss" not in without[0]
    values = [record["experts/sparsity_loss"] for record in having]
    assert values[0] > 0
    assert values[-1] < values[0]
    assert having[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-6)
    assert having[-1]["loss"] != without[-1]["loss"]


@pytest.mark.parametrize("way", ["tiny_moe-recompute", "tiny_mone-recompute", "tiny_mone-packed"])
def test_memory_modes_compute_the_same(runs: Path, way: str) -> None:
    expected = records(runs / f"{way.partition('-')[0]}-{LOSSES[-1]}-one")
    for one, record in zip(expected, records(runs / way), strict=True):
        for key in ("loss", "grad_norm", "experts/sparsity_loss"):
            assert record[key] == pytest.approx(one[key], rel=1e-6), key
