"""How experts compute gate projections, against plain sums over their weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from own_methods import own_names
from test_each_rule import problems
from torch import Tensor

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config, ParallelConfig, TrainConfig
from mone_megatron.hf.configuration_mone import MoneConfig
from mone_megatron.hf.decode_mone import unsupported
from mone_megatron.hf.modeling_mone import MoneExperts
from mone_megatron.kernels import ops
from mone_megatron.kernels.reference import topk_mask
from mone_megatron.methods.gate import GateSize, Products
from mone_megatron.methods.gates import GATES
from mone_megatron.mone.experts import GroupedExperts
from mone_megatron.mone.neurons import NeuronSettings, Segments
from mone_megatron.mone.selection import NeuronSelection
from mone_megatron.parallel.groups import open_groups
from mone_megatron.planning import count_parameters
from mone_megatron.planning.parameters import gated_mlps
from mone_megatron.testing.processes import Processes

HIDDEN, NEURONS, KEPT = 16, 24, 6
COUNTS = (5, 0, 4)
CHEAP = [gate.name for gate in GATES if gate.ranked]


def make_experts(gate: str, rank: int, **changes: object) -> GroupedExperts:
    """Experts with the same values on every rank; tensor parallelism takes its rows."""
    settings: dict[str, object] = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": 2,
        "moe_ffn_hidden_size": NEURONS, "gated_linear_unit": True, "activation_func": F.silu,
        "add_bias_linear": False, "use_cpu_initialization": True, "cuda_graph_scope": [],
        "gradient_accumulation_fusion": False,
    }  # fmt: skip
    experts = GroupedExperts(
        len(COUNTS),
        TransformerConfig(**{**settings, **changes}),
        ProcessGroupCollection.use_mpu_process_groups(),
        NeuronSettings(NeuronSelection(KEPT / NEURONS)),
        gate=gate,
        gate_rank=rank,
    )
    generator = torch.Generator().manual_seed(7)
    ranks, here = experts.tensor_group.size(), experts.tensor_group.rank()
    with torch.no_grad():
        for parameter in experts.parameters():
            dim = parameter.partition_dim
            shape = list(parameter.shape)
            shape[dim] *= ranks
            whole = torch.randn(shape, generator=generator)
            parameter.copy_(whole.chunk(ranks, dim=dim)[here])
    return experts.train()


def run(experts: GroupedExperts) -> dict[str, Tensor]:
    """Output, and gradients of the tokens and of every weight."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randn(sum(COUNTS), HIDDEN, generator=generator).requires_grad_()
    grad = torch.randn(sum(COUNTS), HIDDEN, generator=generator)
    probs = torch.rand(sum(COUNTS), generator=generator)
    index = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    groups = ops.RowGroups.of(torch.tensor(COUNTS))
    output, _ = experts(tokens, groups, probs, Segments(index, 1, None))
    named = dict(experts.named_parameters())
    grads = torch.autograd.grad(output, [tokens, *named.values()], grad)
    return dict(zip(["output", "tokens", *named], [output.detach(), *grads], strict=True))


def by_hand(experts: GroupedExperts) -> dict[str, Tensor]:
    """The same, one expert after another, from what the papers say of a gate."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randn(sum(COUNTS), HIDDEN, generator=generator).requires_grad_()
    grad = torch.randn(sum(COUNTS), HIDDEN, generator=generator)
    probs = torch.rand(sum(COUNTS), generator=generator)
    named = {name: weight.detach().clone().requires_grad_() for name, weight in
             experts.named_parameters()}  # fmt: skip
    outputs = []
    for expert, x in enumerate(tokens.split(COUNTS)):
        one = {name: weight[expert] for name, weight in named.items()}
        if experts.gate.name == "low_rank":
            gate = torch.einsum("th,qh,fq->tf", x, one["gate_in_weight"], one["gate_out_weight"])
            up = x @ one["up_weight"].T
        else:
            q = one["gate_weight"].shape[-1]
            gate, up = x[:, :q] @ one["gate_weight"].T, x[:, q:] @ one["up_weight"].T
        hidden = F.silu(gate) * up * topk_mask(F.silu(gate).abs(), KEPT)
        outputs.append(hidden @ one["down_weight"])
    output = torch.cat(outputs) * probs.unsqueeze(-1)
    grads = torch.autograd.grad(output, [tokens, *named.values()], grad)
    return dict(zip(["output", "tokens", *named], [output.detach(), *grads], strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * size, msg=name)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("rank", [4, 8, 12])
@pytest.mark.parametrize("gate", ["low_rank", "split"])
def test_a_gate_is_what_its_paper_says(gate: str, rank: int) -> None:
    experts = make_experts(gate, rank)
    assert_equal(run(experts), by_hand(experts))


@pytest.mark.usefixtures("one_process")
def test_low_rank_with_the_identity_is_the_full_gate() -> None:
    experts, full = make_experts("low_rank", HIDDEN), make_experts("full", 0)
    with torch.no_grad():
        gate, up = full.gate_up_weight.unbind(dim=1)
        experts.get_parameter("gate_in_weight").copy_(torch.eye(HIDDEN))
        experts.get_parameter("gate_out_weight").copy_(gate)
        experts.get_parameter("up_weight").copy_(up)
        experts.down_weight.copy_(full.down_weight)
    found, expected = run(experts), run(full)
    for name in ("output", "tokens", "down_weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6 * 50)
    torch.testing.assert_close(found["gate_out_weight"], expected["gate_up_weight"][:, 0])


@pytest.mark.usefixtures("one_process")
def test_split_is_the_full_gate_with_zeros() -> None:
    experts, full = make_experts("split", 4), make_experts("full", 0)
    with torch.no_grad():
        full.gate_up_weight.zero_()
        full.gate_up_weight[:, 0, :, :4] = experts.get_parameter("gate_weight")
        full.gate_up_weight[:, 1, :, 4:] = experts.get_parameter("up_weight")
        full.down_weight.copy_(experts.down_weight)
    found, expected = run(experts), run(full)
    for name in ("output", "tokens", "down_weight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6 * 50)


def _on_two(gate: str, rank: int) -> dict[str, Tensor]:
    open_groups(ParallelConfig(tensor=2, expert_tensor=2), TrainConfig(), timeout_seconds=300)
    split = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    experts = make_experts(gate, rank, **split)
    return run(experts) | {"dims": {n: p.partition_dim for n, p in experts.named_parameters()}}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("gate", CHEAP)
def test_ranks_that_share_experts_add_up_to_one(two_processes: Processes, gate: str) -> None:
    first, second = two_processes.run(_on_two, gate, 8)
    dims = first.pop("dims")
    combined = {
        name: torch.cat([first[name], second[name]], dim=dims[name])
        if name in dims
        else first[name] + second[name]
        for name in first
    }
    assert_equal(combined, run(make_experts(gate, 8)))


def planned(gate: str, rank: int) -> Config:
    """The run whose experts :func:`make_experts` makes."""
    return compose(
        ["experiment=tiny_mone", f"model.gate={gate}", f"model.gate_rank={rank}",
         f"model.hidden_size={HIDDEN}", f"model.expert_ffn_hidden_size={NEURONS}"]
    )  # fmt: skip


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("gate", [gate.name for gate in GATES])
def test_the_planner_counts_the_weights_that_there_are(gate: str) -> None:
    rank = 0 if gate == "full" else 8
    config = planned(gate, rank)
    weights = make_experts(gate, rank).parameters()
    mlp = gated_mlps(config.model, config.mone)["routed"]
    assert mlp.parameters == sum(weight[0].numel() for weight in weights)
    assert mlp.kept == KEPT
    counted = count_parameters(config.model, config.mone, 100)
    assert counted.routed_experts == mlp.parameters * mlp.count


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("gate", own_names(GATES))
def test_the_planner_counts_what_a_token_of_kept_neurons_reads(gate: str) -> None:
    """Gates whole, and of the rest the rows of kept neurons."""
    rank = 0 if gate == "full" else 8
    config = planned(gate, rank)
    one = {name: weight[0] for name, weight in make_experts(gate, rank).named_parameters()}
    read = {
        "full": lambda: one["gate_up_weight"][0].numel() + one["gate_up_weight"][1, :KEPT].numel(),
        "low_rank": lambda: one["gate_in_weight"].numel() + one["gate_out_weight"].numel()
        + one["up_weight"][:KEPT].numel(),
        "split": lambda: one["gate_weight"].numel() + one["up_weight"][:KEPT].numel(),
    }[gate]() + one["down_weight"][:KEPT].numel()  # fmt: skip
    assert gated_mlps(config.model, config.mone)["routed"].gate_counted == read
    if gate == "low_rank":
        assert read == HIDDEN * 8 + 8 * NEURONS + 2 * HIDDEN * KEPT


@pytest.mark.parametrize("gate", [gate.name for gate in GATES])
@pytest.mark.parametrize("rank", [16, 64])
def test_gates_begin_with_the_variance_of_full_ones(gate: str, rank: int) -> None:
    size, std = GateSize(256, 512, rank), 0.02
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(weight.shape, generator=generator)
        * (weight.std if weight.absolute else weight.std * std)
        for name, weight in GATES[gate].weights(size).items()
    }
    tokens = torch.randn(200, 256, generator=generator)
    found = GATES[gate].project(tokens, drawn, Products(lambda x, w: x @ w.flatten(0, -2).T))
    for projections in found:
        assert projections.std().item() == pytest.approx(std * 256**0.5, rel=0.15)


@pytest.mark.parametrize("gate", CHEAP)
def test_tools_see_the_matrices_that_a_gate_comes_to(gate: str) -> None:
    config = MoneConfig(
        hidden_size=HIDDEN, moe_intermediate_size=NEURONS, num_experts=3, num_experts_per_tok=2,
        gate=gate, gate_rank=4, mone={"keep_ratio": 0.25}, hidden_act="silu",
    )  # fmt: skip
    experts = MoneExperts(config)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(std=0.3)
    rows = torch.randn(3, 7, HIDDEN)
    expected = experts.gate_and_up(rows, lambda x, w: x @ w.mT)
    found = (rows @ experts.gate_up_proj.mT).chunk(2, dim=-1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert unsupported(experts) == "has a gate that is no matrix of its own (model.gate)"
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    tokens, weights = torch.randn(4, HIDDEN), torch.rand(4, 2)
    config._experts_implementation = "mone"
    by_tokens = [experts(tokens[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(
        experts(tokens, index, weights), torch.cat(by_tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate_rank=8"], "model.gate_rank: 8 has no effect with model.gate=full"),
        (["gate=low_rank", "gate_rank=72"], "model.gate_rank: 72 is more than model.hidden_size"),
        (["gate=split", "gate_rank=64"], "model.gate_rank: 64 leaves no values of"),
        (["gate=split", "gate_rank=6"], "model.gate_rank: 6 / parallel.expert_tensor=1 is not a"),
        (
            ["gate=low_rank", "num_experts=0"],
            "model.gate: low_rank is the gate of routed experts, and model.num_experts is 0",
        ),
    ],
)
def test_what_a_gate_cannot_be_is_refused_by_its_key(overrides: list[str], message: str) -> None:
    more = ["mone.enabled=false"] if "num_experts=0" in overrides else []
    found = list(problems(*(f"model.{one}" for one in overrides), *more))
    assert len(found) == 1, found
    assert found[0].startswith(message)


def test_a_rank_is_shared_evenly() -> None:
    layout = ["parallel.tensor=4", "parallel.expert_tensor=4", "model.num_query_groups=4"]
    found = list(problems("model.gate=low_rank", "model.gate_rank=6", *layout))
    assert found[0].startswith("parallel.expert_tensor: 4 does not divide model.gate_rank=6")
