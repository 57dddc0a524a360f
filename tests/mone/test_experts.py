from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mone_megatron.config.schema import ParallelConfig, TrainConfig
from mone_megatron.kernels import ops
from mone_megatron.methods.activations import ACTIVATIONS
from mone_megatron.methods.scores import SCORES as REGISTERED
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.neurons import NeuronSettings, Segments
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.parallel.groups import open_groups
from mone_megatron.testing.processes import Processes

HIDDEN = 8
# Those that a kernel can be asked for: they read nothing but gate and up.
SCORES = [score.name for score in REGISTERED if "down_norm" not in score.reads]
# (neurons, rows of each expert)
SHAPES = {
    "several": (16, (5, 3, 4)),
    "empty_experts": (12, (0, 6, 0, 2, 0)),
    "one_token": (20, (0, 1)),
    "zero_tokens": (16, (0, 0, 0)),
    "wide": (20, (7, 1)),
}


def transformer_config(neurons: int, **changes: object) -> TransformerConfig:
    settings: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": 2,
        "moe_ffn_hidden_size": neurons,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "cuda_graph_scope": [],
    }
    return TransformerConfig(**{**settings, **changes})


def make_experts(
    neurons: int, num_experts: int, settings: NeuronSettings | None, **changes: object
) -> GroupedExperts:
    """Experts with the same values on every rank; tensor parallelism takes its neurons."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(neurons, **changes)
    experts = GroupedExperts(num_experts, config, groups, settings)
    generator = torch.Generator().manual_seed(7)
    rank, size = groups.expt_tp.rank(), groups.expt_tp.size()
    with torch.no_grad():
        for parameter in (experts.gate_up_weight, experts.down_weight):
            shape = list(parameter.shape)
            shape[parameter.partition_dim] *= size
            whole = torch.randn(shape, generator=generator)
            parameter.copy_(whole.chunk(size, dim=parameter.partition_dim)[rank])
    return experts.train()


def make_rows(counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Segments]:
    generator = torch.Generator().manual_seed(11)
    rows = sum(counts)
    tokens = torch.randn(rows, HIDDEN, generator=generator).requires_grad_()
    probs = torch.rand(rows, generator=generator).requires_grad_()
    grad = torch.randn(rows, HIDDEN, generator=generator)
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return tokens, probs, grad, Segments(index, 1, None)


def run_experts(
    experts: GroupedExperts, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of tokens, probs, gate_up_weight and down_weight."""
    tokens, probs, grad, segments = make_rows(counts)
    output, bias = experts(tokens, ops.RowGroups.of(torch.tensor(counts)), probs, segments)
    assert bias is None
    inputs = (tokens, probs, experts.gate_up_weight, experts.down_weight)
    return (output.detach(), *torch.autograd.grad(output, inputs, grad))


PLAIN_ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda g: g / (1 + math.exp(-g)),
    "sigmoid": lambda g: 1 / (1 + math.exp(-g)),
    "relu": lambda g: max(g, 0.0),
    "relu2": lambda g: max(g, 0.0) ** 2,
}


def kept_neurons(
    gate: list[float], up: list[float], score: str, k: int, activation_name: str
) -> list[int]:
    def rank(neuron: int) -> float:
        g = gate[neuron]
        activation = PLAIN_ACTIVATIONS[activation_name](g)
        return {
            "abs_activation": abs(activation),
            "abs_gate": abs(g),
            "signed_gate": g,
            "abs_product": abs(activation * up[neuron]),
        }[score]

    return sorted(range(len(gate)), key=lambda neuron: (-rank(neuron), neuron))[:k]


def loop_over_tokens_and_neurons(
    tokens: Tensor,
    probs: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    counts: tuple[int, ...],
    score: str,
    k: int,
    activation_name: str = "silu",
) -> Tensor:
    """The formula of the method, one token and one neuron at a time."""
    outputs, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            x = tokens[row]
            gates = [x @ weight for weight in gate_up_weight[expert, 0]]
            ups = [x @ weight for weight in gate_up_weight[expert, 1]]
            kept = kept_neurons(
                [g.item() for g in gates], [u.item() for u in ups], score, k, activation_name
            )
            total = torch.zeros(HIDDEN)
            for neuron in kept:
                g = gates[neuron]
                activation = {
                    "silu": g * torch.sigmoid(g),
                    "sigmoid": torch.sigmoid(g),
                    "relu": g.clamp_min(0.0),
                    "relu2": g.clamp_min(0.0) ** 2,
                }[activation_name]
                total = total + activation * ups[neuron] * down_weight[expert, neuron]
            outputs.append(probs[row] * total)
            row += 1
    # The sum of nothing still depends on everything, with gradients of 0.
    nothing = 0.0 * (tokens.sum() + probs.sum() + gate_up_weight.sum() + down_weight.sum())
    return (torch.stack(outputs) if outputs else torch.zeros(0, HIDDEN)) + nothing


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep_ratio", [1 / 8, 1 / 4, 1 / 2, 1.0])
@pytest.mark.parametrize("score", SCORES)
def test_experts_match_a_loop_over_tokens_and_neurons(
    score: str, keep_ratio: float, shape: str
) -> None:
    compare_with_a_loop(score, keep_ratio, shape, "silu")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("keep_ratio", [1 / 4, 3 / 4, 1.0])
@pytest.mark.parametrize("score", ["abs_activation", "abs_product"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "relu2"])
def test_other_activations_match_a_loop(activation: str, score: str, keep_ratio: float) -> None:
    """ReLU leaves many weights at 0: above a half, ties at 0 decide who is kept."""
    compare_with_a_loop(score, keep_ratio, "several", activation)


def compare_with_a_loop(score: str, keep_ratio: float, shape: str, activation: str) -> None:
    neurons, counts = SHAPES[shape]
    selection = NeuronSelection(keep_ratio, score)
    experts = make_experts(
        neurons,
        len(counts),
        NeuronSettings(selection),
        activation_func=ACTIVATIONS[activation].function,
    )
    results = run_experts(experts, counts)

    tokens, probs, grad, _ = make_rows(counts)
    weights = [
        parameter.detach().clone().requires_grad_()
        for parameter in (experts.gate_up_weight, experts.down_weight)
    ]
    output = loop_over_tokens_and_neurons(
        tokens, probs, *weights, counts, score, round(keep_ratio * neurons), activation
    )
    gradients = torch.autograd.grad(output, (tokens, probs, *weights), grad)
    for ours, expected in zip(results, (output.detach(), *gradients), strict=True):
        assert ours.shape == expected.shape
        # Sums that cancel are as exact as their terms, whose size the largest value shows.
        size = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * max(1.0, size))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_all_is_the_plain_moe_bit_for_bit(shape: str) -> None:
    neurons, counts = SHAPES[shape]
    plain = run_experts(make_experts(neurons, len(counts), None), counts)
    kept_all = NeuronSettings(NeuronSelection(1.0, "abs_product"))
    ours = run_experts(make_experts(neurons, len(counts), kept_all), counts)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    # And it is the usual SwiGLU, expert by expert.
    experts = make_experts(neurons, len(counts), None)
    tokens, probs, _, _ = make_rows(counts)
    expected = []
    for expert, (x, p) in enumerate(zip(tokens.split(counts), probs.split(counts), strict=True)):
        gate_weight, up_weight = experts.gate_up_weight[expert]
        hidden = F.silu(x @ gate_weight.T) * (x @ up_weight.T)
        expected.append(p.unsqueeze(-1) * (hidden @ experts.down_weight[expert]))
    torch.testing.assert_close(plain[0], torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_selection_changes_the_result_and_keeps_exactly_k_in_bf16() -> None:
    counts = (300, 200)
    settings = NeuronSettings(NeuronSelection(0.25))
    experts = make_experts(16, 2, settings, params_dtype=torch.bfloat16)
    masks: list[Tensor] = []
    assert experts.neuron_gate.selector is not None
    experts.neuron_gate.selector.register_forward_hook(lambda *call: masks.append(call[2]))
    tokens, probs, _, segments = make_rows(counts)
    output, _ = experts(tokens.bfloat16(), ops.RowGroups.of(torch.tensor(counts)), probs, segments)
    assert output.dtype is torch.bfloat16
    assert masks[0].shape == (500, 16)
    assert masks[0].sum(-1).eq(4).all()
    plain = make_experts(16, 2, None, params_dtype=torch.bfloat16)
    plain_output, _ = plain(
        tokens.bfloat16(), ops.RowGroups.of(torch.tensor(counts)), probs, segments
    )
    assert not torch.allclose(output, plain_output)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_bias_linear": True}, r"add_bias_linear=True \(only False\)"),
        ({"gated_linear_unit": False}, r"gated_linear_unit=False \(only True\)"),
        (
            {
                "moe_apply_probs_on_input": True,
                "moe_router_topk": 1,
                "moe_router_pre_softmax": True,
            },
            "moe_apply_probs_on_input",
        ),
        ({"activation_func_clamp_value": 7.0}, r"activation_func_clamp_value=7\.0"),
    ],
)
def test_other_experts_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_experts(16, 2, None, **changes)


@pytest.mark.usefixtures("one_process")
def test_a_keep_ratio_of_no_neuron_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mone\.keep_ratio"):
        make_experts(16, 2, NeuronSettings(NeuronSelection(0.01)))


def _partial_results(
    counts: tuple[int, ...], neurons: int, settings: NeuronSettings | None
) -> tuple[Tensor, ...]:
    parallel = ParallelConfig(tensor=2, expert_tensor=2)
    open_groups(parallel, TrainConfig(), timeout_seconds=300)
    assert dist.get_world_size() == 2
    experts = make_experts(
        neurons, len(counts), settings, tensor_model_parallel_size=2, expert_tensor_parallel_size=2
    )
    assert experts.neurons_per_rank == neurons // 2
    return run_experts(experts, counts)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shape", ["several", "empty_experts", "zero_tokens"])
@pytest.mark.parametrize("keep_ratio", [1 / 4, 3 / 4, 1.0])
def test_expert_tensor_parallelism_adds_up_to_one_rank(
    two_processes: Processes, shape: str, keep_ratio: float
) -> None:
    neurons, counts = SHAPES[shape]
    if neurons % 8:  # half of them must still be aligned for grouped_mm
        neurons = 24
    settings = NeuronSettings(NeuronSelection(keep_ratio))
    whole = run_experts(make_experts(neurons, len(counts), settings), counts)
    parts = two_processes.run(_partial_results, counts, neurons, settings)
    first, second = parts
    combined = (
        first[0] + second[0],  # output
        first[1] + second[1],  # gradient of tokens
        first[2] + second[2],  # of probs
        torch.cat([first[3], second[3]], dim=2),  # of gate_up_weight
        torch.cat([first[4], second[4]], dim=1),  # of down_weight
    )
    for ours, expected in zip(combined, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_process")
def test_sharded_state_dict_names_whole_tensors() -> None:
    experts = make_experts(16, 3, None)
    tensors = experts.sharded_state_dict("layer.")
    assert {key: tensor.global_shape for key, tensor in tensors.items()} == {
        "layer.gate_up_weight": (3, 2, 16, HIDDEN),
        "layer.down_weight": (3, 16, HIDDEN),
    }
