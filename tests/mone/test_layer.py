"""MoNELayer in every layout: the same losses and gradients as its microbatches run alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config, MoNEConfig, NeuronBalanceConfig, ParallelConfig
from mone_megatron.model.builder import build_gpt
from mone_megatron.model.transformer import transformer_config
from mone_megatron.mone.layer import MicrobatchSources, MoNELayer
from mone_megatron.mone.neurons import NEURON_BALANCE_LOSS
from mone_megatron.parallel.groups import open_expert_sources, open_groups
from mone_megatron.parallel.megatron_compat.auxiliary_losses import layer_losses, zero_layer_losses
from mone_megatron.testing.processes import Processes

SEQUENCE, BATCH = 12, 2


@dataclass(frozen=True)
class LayerResult:
    """What one layer did with one or more microbatches, whole experts in fp32."""

    balance_loss: float
    gate_up_gradient: Tensor
    outputs: tuple[Tensor, ...]
    masks: int


def layer_config(parallel: ParallelConfig, mone: MoNEConfig) -> Config:
    config = compose(["experiment=tiny_mone"])
    router = replace(config.model.router, balance=(), balance_coeff=(), z_loss_coeff=0.0)
    model = replace(config.model, num_layers=1, router=router)
    return replace(config, model=model, parallel=parallel, mone=mone)


def build_layer(config: Config, sources: MicrobatchSources) -> MoNELayer:
    transformer = transformer_config(
        config,
        dtype=torch.float32,
        on_cpu=True,
        sequence_parallel=config.parallel.tensor > 1,
    )
    model = build_gpt(
        config, transformer, vocab_size=128, sources=sources, on_cpu=True, vp_stage=None
    )
    layer = model.decoder.layers[0].mlp
    assert isinstance(layer, MoNELayer)
    return layer.train()


def microbatch(number: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(SEQUENCE, BATCH, hidden, generator=generator)


def run_layer(layer: MoNELayer, hidden_states: Tensor) -> LayerResult:
    """Forward, and backward of the neuron balance loss alone."""
    zero_layer_losses()
    masks: list[Tensor] = []
    topk = layer.experts.neuron_gate.selector
    assert topk is not None
    handle = topk.register_forward_hook(lambda *call: masks.append(call[2]))
    output, _ = layer(hidden_states.clone().requires_grad_())
    handle.remove()
    weight = layer.experts.gate_up_weight
    (gradient,) = torch.autograd.grad(output, [weight], torch.zeros_like(output))
    values = layer_losses()[NEURON_BALANCE_LOSS]
    kept = sum(int(mask.sum()) for mask in masks)
    return LayerResult(float(values.sum()), gradient, (output.detach(),), kept)


def _run_in_layout(config: Config) -> tuple[LayerResult, tuple[int, ...], bool]:
    """This rank's part of its data-parallel rank's microbatch, then whole gradients."""
    parallel = config.parallel
    open_groups(parallel, config.train, timeout_seconds=300)
    found = open_expert_sources(parallel)
    sources = MicrobatchSources(
        found.microbatch_of_source,
        found.shared_group,
        together=config.mone.balance.scope == "group",
    )
    layer = build_layer(config, sources)
    whole = microbatch(parallel_state.get_data_parallel_rank(), config.model.hidden_size)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    result = run_layer(layer, whole.chunk(parallel.tensor, dim=0)[tensor_rank])

    loss = torch.tensor([result.balance_loss])
    kept = torch.tensor([result.masks])
    dist.all_reduce(loss)
    dist.all_reduce(kept)
    gradient = result.gate_up_gradient.clone()
    dist.all_reduce(gradient, group=layer.experts.replica_group)
    gradient = _gather(gradient, layer.experts.tensor_group, dim=2)
    gradient = _gather(gradient, layer.experts.expert_group, dim=0)
    whole_result = LayerResult(loss.item(), gradient, result.outputs, int(kept))
    return whole_result, found.microbatch_of_source, found.shared_group is not None


def _gather(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def run_alone(config: Config, microbatches: int) -> list[LayerResult]:
    alone = replace(config, parallel=ParallelConfig())
    layer = build_layer(alone, MicrobatchSources((0,)))
    return [run_layer(layer, microbatch(m, config.model.hidden_size)) for m in range(microbatches)]


# name: (ranks, layout, microbatch of each source, whether ranks share a microbatch's experts)
LAYOUTS: dict[str, tuple[int, ParallelConfig, tuple[int, ...], bool]] = {
    "ep2": (2, ParallelConfig(expert=2), (0, 1), False),
    "ep2_allgather": (2, ParallelConfig(expert=2, dispatcher="allgather"), (0, 1), False),
    "etp2_tp1": (2, ParallelConfig(expert_tensor=2), (0, 1), False),
    "tp2_ep1_etp1": (2, ParallelConfig(tensor=2), (0,), True),
    "tp2_etp2": (2, ParallelConfig(tensor=2, expert_tensor=2), (0, 0), False),
    "tp2_ep2": (2, ParallelConfig(tensor=2, expert=2), (0, 0), False),
    "dp2": (2, ParallelConfig(), (0,), False),
    "tp2_ep2_on_4": (4, ParallelConfig(tensor=2, expert=2), (0, 0), False),
    "tp2_ep4": (4, ParallelConfig(tensor=2, expert=4), (0, 0, 1, 1), False),
    "tp2_etp2_ep2": (
        4,
        ParallelConfig(tensor=2, expert_tensor=2, expert=2),
        (0, 0, 1, 1),
        False,
    ),
    "etp2_ep2": (4, ParallelConfig(expert_tensor=2, expert=2), (0, 1, 2, 3), False),
    "etp2_ep2_allgather": (
        4,
        ParallelConfig(expert_tensor=2, expert=2, dispatcher="allgather"),
        (0, 1, 2, 3),
        False,
    ),
    "tp4_etp2": (4, ParallelConfig(tensor=4, expert_tensor=2), (0, 0), True),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_their_microbatches_alone(name: str, request: pytest.FixtureRequest) -> None:
    ranks, parallel, sources, shared = LAYOUTS[name]
    mone = MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=1.0))
    config = layer_config(parallel, mone)
    processes: Processes = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[ranks])
    by_rank = processes.run(_run_in_layout, config)

    alone = run_alone(config, ranks // parallel.tensor)
    gradient = torch.stack([result.gate_up_gradient for result in alone]).sum(0)
    assert gradient.abs().max() > 1e-4
    kept = sum(result.masks for result in alone)
    assert kept == len(alone) * SEQUENCE * BATCH * 2 * 16  # two experts a token, 16 neurons each
    for rank, (result, found_sources, found_shared) in enumerate(by_rank):
        assert (found_sources, found_shared) == (sources, shared)
        expected_loss = sum(single.balance_loss for single in alone)
        assert result.balance_loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(result.gate_up_gradient, gradient, rtol=1e-4, atol=1e-7)
        assert result.masks == kept
        whole = alone[rank // parallel.tensor].outputs[0]
        part = whole.chunk(parallel.tensor, dim=0)[rank % parallel.tensor]
        torch.testing.assert_close(result.outputs[0], part, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["ep2", "etp2_tp1", "tp2_ep1_etp1", "tp2_ep4", "etp2_ep2"])
def test_a_group_is_balanced_as_the_union_of_its_microbatches(
    name: str, request: pytest.FixtureRequest
) -> None:
    ranks, parallel, sources, _ = LAYOUTS[name]
    mone = MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=1.0, scope="group"))
    config = layer_config(parallel, mone)
    processes: Processes = request.getfixturevalue({2: "two_processes", 4: "four_processes"}[ranks])
    count = max(sources) + 1
    layer = build_layer(replace(config, parallel=ParallelConfig()), MicrobatchSources((0,)))
    union = [microbatch(m, config.model.hidden_size) for m in range(count)]
    expected = run_layer(layer, torch.cat(union, dim=1))
    for result, found, _ in processes.run(_run_in_layout, config):
        assert found == sources
        # As many microbatches are balanced as before, by one loss.
        assert result.balance_loss == pytest.approx(count * expected.balance_loss, rel=1e-5)
        gradient = count * expected.gate_up_gradient
        torch.testing.assert_close(result.gate_up_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("one_process")
def test_the_balance_of_a_microbatch_differs_from_that_of_the_union() -> None:
    # What makes the test above bite: the loss is not linear in its tokens.
    mone = MoNEConfig(enabled=True, balance=NeuronBalanceConfig(coeff=1.0))
    config = layer_config(ParallelConfig(), mone)
    layer = build_layer(config, MicrobatchSources((0,)))
    both = torch.cat([microbatch(m, config.model.hidden_size) for m in (0, 1)], dim=1)
    union = run_layer(layer, both).balance_loss
    alone = [result.balance_loss for result in run_alone(config, 2)]
    assert abs(union - sum(alone) / 2) > 1e-2


@pytest.mark.usefixtures("one_process")
def test_layer_is_megatron_cores_with_its_number_passed_on() -> None:
    layer = build_layer(layer_config(ParallelConfig(), MoNEConfig()), MicrobatchSources((0,)))
    assert isinstance(layer, MoELayer)
    assert layer.experts.neuron_gate.selector is None
    assert layer.experts.neuron_gate.layer_number == 1
    layer.set_layer_number(5)
    assert layer.experts.neuron_gate.layer_number == 5


@pytest.mark.usefixtures("one_process")
def test_a_dispatcher_that_mixes_microbatches_is_refused() -> None:
    layer = build_layer(layer_config(ParallelConfig(), MoNEConfig()), MicrobatchSources((0,)))
    config = replace(layer.config)
    config.moe_token_dispatcher_type = "flex"

    class NoDispatcher:
        """The flex dispatcher itself needs DeepEP."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_layer, "MoEFlexTokenDispatcher", NoDispatcher)
        MoNELayer(config, layer.submodules, 1, sources=MicrobatchSources((0,)))
        MoNELayer(config, layer.submodules, 1, sources=MicrobatchSources((0, 1), together=True))
        with pytest.raises(ValueError, match=r"parallel\.dispatcher: flex .* use alltoall"):
            MoNELayer(config, layer.submodules, 1, sources=MicrobatchSources((0, 1)))
