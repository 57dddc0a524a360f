"""Parameter counts against published totals and against a plain sum of matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.config.load import compose
from mone_megatron.config.schema import ModelConfig, MoNEConfig
from mone_megatron.methods.gates import GATES
from mone_megatron.methods.rule import count_kept
from mone_megatron.methods.scores import SCORES
from mone_megatron.planning import ParameterCount, count_parameters

MOE = MoNEConfig()


def count(experiment: str, *, padded: bool = False) -> ParameterCount:
    config = compose([f"experiment={experiment}"])
    return count_parameters(config.model, config.mone, config.model.vocab_size, padded=padded)


@pytest.mark.parametrize(
    ("experiment", "total"),
    [
        ("qwen3_30b_a3b_moe", 30_532_122_624),
        ("mixtral_8x7b_moe", 46_702_792_704),
        ("olmoe_1b_7b_moe", 6_919_161_856),
        ("deepseek_v2_lite_moe", 15_706_484_224),
    ],
)
def test_published_totals(experiment: str, total: int) -> None:
    assert count(experiment).total == total


@pytest.mark.parametrize(
    ("experiment", "billions"), [("qwen3_30b_a3b_moe", 3.35), ("mixtral_8x7b_moe", 12.88)]
)
def test_published_activated_counts(experiment: str, billions: float) -> None:
    # Published as 3.3B and 12.9B.
    assert count(experiment).activated_gate_counted / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("size", "active", "total"),
    [
        ("38m", 38e6, 100e6),
        ("98m", 98e6, 349e6),
        ("115m", 115e6, 459e6),
        ("290m", 290e6, 1.3e9),
        ("419m", 419e6, 2.2e9),
        ("721m", 721e6, 3.8e9),
        ("1_7b", 1.7e9, 10.3e9),
    ],
)
def test_flame_sizes_match_their_names(size: str, active: float, total: float) -> None:
    counted = count(f"flame_{size}_moe")
    assert counted.total == pytest.approx(total, rel=0.03)
    # The names round down: the shape of 1.7B has 1.754B.
    assert counted.activated_gate_counted == pytest.approx(active, rel=0.035)


@pytest.mark.parametrize(("size", "total"), [("0.9b", 925e6), ("2.8b", 2.81e9)])
def test_paper_sizes(size: str, total: float) -> None:
    for kind in ("moe", "mone"):
        assert count(f"{kind}_{size}").total == pytest.approx(total, rel=0.01)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> torch.nn.Module:
    return torch.nn.Linear(inputs, outputs, bias=bias, device="meta")


def reference(model: ModelConfig, rows: int) -> torch.nn.ModuleList:
    """The model's matrices as plain modules, on the meta device."""
    h, d = model.hidden_size, model.head_dim or model.hidden_size // model.num_attention_heads
    modules: list[torch.nn.Module] = [torch.nn.Embedding(rows, h, device="meta")]
    if not model.tie_embeddings:
        modules.append(linear(h, rows))

    def gated(width: int) -> list[torch.nn.Module]:
        return [linear(h, width), linear(h, width), linear(width, h)]

    def norm(width: int) -> torch.nn.Module:
        return torch.nn.RMSNorm(width, device="meta")

    for layer in range(model.num_layers):
        heads = [model.num_attention_heads, model.num_query_groups, model.num_query_groups]
        modules += [linear(h, n * d, bias=model.qkv_bias) for n in heads]
        modules += [linear(model.num_attention_heads * d, h), norm(h), norm(h)]
        if model.qk_norm:
            scope = heads[:2] if model.qk_norm_scope == "all_heads" else [1, 1]
            modules += [norm(n * d) for n in scope]
        if model.num_experts == 0 or layer < model.first_dense_layers:
            modules += gated(model.dense_ffn_hidden_size)
            continue
        modules.append(linear(h, model.num_experts))
        for _ in range(model.num_experts):
            modules += gated(model.expert_ffn_hidden_size)
        if model.shared_expert_ffn_hidden_size:
            modules += gated(model.shared_expert_ffn_hidden_size)
            if model.shared_expert_gate:
                modules.append(linear(h, 1))
    return torch.nn.ModuleList([*modules, norm(h)])


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(2, 4), experts=st.sampled_from([0, 4]), dense=st.integers(0, 1),
    shared=st.sampled_from([0, 24]), gate=st.booleans(), tied=st.booleans(),
    qk_norm=st.sampled_from(["", "head", "all_heads"]), qkv_bias=st.booleans(),
    head_dim=st.sampled_from([0, 20]), vocab=st.integers(1, 700),
)  # fmt: skip
def test_totals_match_built_modules(
    layers: int, experts: int, dense: int, shared: int, gate: bool, tied: bool, qk_norm: str,
    qkv_bias: bool, head_dim: int, vocab: int,
) -> None:  # fmt: skip
    model = ModelConfig(
        num_layers=layers, hidden_size=32, num_attention_heads=4, num_query_groups=2,
        head_dim=head_dim, dense_ffn_hidden_size=48, num_experts=experts,
        expert_ffn_hidden_size=16, first_dense_layers=dense if experts else 0,
        shared_expert_ffn_hidden_size=shared if experts else 0,
        shared_expert_gate=gate and bool(shared and experts), tie_embeddings=tied,
        qk_norm=bool(qk_norm), qk_norm_scope=qk_norm or "head", qkv_bias=qkv_bias,
    )  # fmt: skip
    padded = -(-vocab // 128) * 128
    for rows, flag in ((vocab, False), (padded, True)):
        built = sum(p.numel() for p in reference(model, rows).parameters())
        assert count_parameters(model, MOE, vocab, padded=flag).total == built


def test_activated_without_selection_leaves_out_unvisited_experts_only() -> None:
    model = ModelConfig(first_dense_layers=1, shared_expert_ffn_hidden_size=64)
    counted = count_parameters(model, MOE, 1000)
    unvisited = 3 * (8 - 2) * 3 * model.hidden_size * model.expert_ffn_hidden_size
    assert counted.activated_gate_counted == counted.total - unvisited
    assert counted.activated_neurons_only == counted.activated_gate_counted


@pytest.mark.parametrize(("ratio", "gate_counted"), [(0.25, 1 / 2), (0.5, 2 / 3), (1.0, 1.0)])
def test_share_of_an_expert_at_a_keep_ratio(ratio: float, gate_counted: float) -> None:
    model = ModelConfig()
    visited = model.num_layers * 2 * 3 * model.hidden_size * model.expert_ffn_hidden_size
    mone = MoNEConfig(enabled=True, keep_ratio=ratio)
    moe = count_parameters(model, MOE, 1000).activated_gate_counted
    counted = count_parameters(model, mone, 1000)
    assert counted.total == count_parameters(model, MOE, 1000).total
    assert moe - counted.activated_gate_counted == pytest.approx(visited * (1 - gate_counted))
    assert moe - counted.activated_neurons_only == pytest.approx(visited * (1 - ratio))


@pytest.mark.parametrize("score", SCORES.names)
def test_what_neurons_are_chosen_by_is_counted_in_full(score: str) -> None:
    model, ratio = ModelConfig(), 0.25
    expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    visited = model.num_layers * model.experts_per_token * expert
    moe = count_parameters(model, MOE, 1000).activated_gate_counted
    counted = count_parameters(model, MoNEConfig(enabled=True, keep_ratio=ratio, score=score), 1000)
    reads = torch.ones(1, 4, requires_grad=True)
    SCORES[score].of(
        gate_TF=reads,
        up_TF=(up_TF := torch.ones(1, 4, requires_grad=True)),
        activate=torch.nn.functional.silu,
        down_norm_TF=torch.ones(4),
    ).sum().backward()
    in_full = 1 if up_TF.grad is None else 2
    share = (in_full + (3 - in_full) * ratio) / 3
    assert moe - counted.activated_gate_counted == pytest.approx(visited * (1 - share))
    assert moe - counted.activated_neurons_only == pytest.approx(visited * (1 - ratio))
    assert counted.activated_all_neurons == moe


@pytest.mark.parametrize(("activation", "in_full"), [("relu", 1), ("drelu", 2)])
def test_zeros_of_an_activation_need_no_up_projection(activation: str, in_full: int) -> None:
    model = ModelConfig(activation=activation)
    mone = MoNEConfig(enabled=True, keep_ratio=0.25, rule="nonzero", score="abs_product")
    moe = count_parameters(model, MOE, 1000).activated_gate_counted
    expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    visited = model.num_layers * model.experts_per_token * expert
    share = (in_full + (3 - in_full) * 0.25) / 3
    counted = count_parameters(model, mone, 1000).activated_gate_counted
    assert moe - counted == pytest.approx(visited * (1 - share))


@pytest.mark.parametrize("gate", [kind for kind in GATES.names if kind != "full"])
def test_a_cheap_gate_beside_up_projections_in_full(gate: str) -> None:
    model = ModelConfig(gate=gate, gate_rank=16)
    mone = MoNEConfig(enabled=True, keep_ratio=0.25)
    by_gate = count_parameters(model, mone, 1000).activated_gate_counted
    by_product = count_parameters(model, replace(mone, score="wina"), 1000).activated_gate_counted
    inputs = model.hidden_size - (16 if gate == "split" else 0)
    left_out = model.expert_ffn_hidden_size * 3 // 4
    visits = model.num_layers * model.experts_per_token
    assert by_product - by_gate == visits * left_out * inputs


def test_apply_to_chooses_the_mlps_that_select() -> None:
    model = ModelConfig(first_dense_layers=1, shared_expert_ffn_hidden_size=64)
    h, moe = model.hidden_size, count_parameters(model, MOE, 1000).activated_neurons_only
    saved = {"routed": 3 * 2 * 128, "shared": 3 * 64, "dense": 512}  # layers x visited x width
    for target, width in saved.items():
        mone = MoNEConfig(enabled=True, keep_ratio=0.25, apply_to=(target,))  # type: ignore[arg-type]
        counted = count_parameters(model, mone, 1000)
        assert moe - counted.activated_neurons_only == 3 * h * width * 3 // 4
    every = MoNEConfig(enabled=True, keep_ratio=0.25, apply_to=("routed", "shared", "dense"))
    counted = count_parameters(model, every, 1000)
    assert moe - counted.activated_neurons_only == 3 * h * sum(saved.values()) * 3 // 4
    # Disabled selection counts as none, whatever its other keys say.
    off = replace(every, enabled=False)
    assert count_parameters(model, off, 1000) == count_parameters(model, MOE, 1000)


def test_padding() -> None:
    model = ModelConfig(hidden_size=64, tie_embeddings=True)
    assert count_parameters(model, MOE, 1000).embedding == 1000 * 64
    assert count_parameters(model, MOE, 1000, padded=True).embedding == 1024 * 64
    assert count_parameters(model, MOE, 1024, padded=True).embedding == 1024 * 64
    assert count_parameters(model, MOE, 1000).output == 0


def test_kept_neurons_round() -> None:
    assert [count_kept(ratio, 10) for ratio in (0.01, 0.06, 0.25, 0.26, 1.0)] == [0, 1, 2, 3, 10]
