"""FLOP counts against torch's own counter and against the closed forms."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mone_megatron.config.load import compose
from mone_megatron.config.schema import MLAConfig, ModelConfig, MoNEConfig
from mone_megatron.planning import count_parameters, flops_per_step
from mone_megatron.planning.flops import forward_flops_per_token, training_flops_per_token

MOE = MoNEConfig()
QUARTER = MoNEConfig(enabled=True, keep_ratio=0.25)


def matmul_flops(tokens: int, shapes: list[tuple[int, int]], *, backward: bool) -> int:
    """FLOPs that torch counts for ``tokens`` rows through each of the matrices."""
    with FlopCounterMode(display=False) as counter:
        for inputs, outputs in shapes:
            x = torch.empty(tokens, inputs, device="meta", requires_grad=backward)
            weight = torch.empty(inputs, outputs, device="meta", requires_grad=backward)
            y = x @ weight
            if backward:
                y.backward(torch.empty_like(y))
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
def test_realised_matches_torch_on_the_matrices_of_a_model(backward: bool) -> None:
    model = ModelConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=12,
        num_experts=4, expert_ffn_hidden_size=16, dense_ffn_hidden_size=40, first_dense_layers=1,
        shared_expert_ffn_hidden_size=24, shared_expert_gate=True,
    )  # fmt: skip
    h, q, k = 32, 48, 24
    gated = lambda width: [(h, width), (h, width), (width, h)]  # noqa: E731
    attention = [(h, q), (h, k), (h, k), (q, h)]
    shapes = [(h, 256)] + 3 * attention + gated(40)
    shapes += 2 * [(h, 4), (h, 1), *gated(16), *gated(16), *gated(24)]
    tokens, seq_length = 10, 7
    count = training_flops_per_token if backward else forward_flops_per_token
    counted = count(model, MOE, seq_length, 200)
    # Scores and values: each token reads (s + 1) / 2 keys on average.
    causal = 3 * 2 * 2 * q * (seq_length + 1) // 2 * (3 if backward else 1)
    assert counted.ideal == counted.realised
    assert tokens * (counted.realised - causal) == matmul_flops(tokens, shapes, backward=backward)


@pytest.mark.parametrize("q_lora_rank", [0, 10])
def test_mla_by_its_matrices(q_lora_rank: int) -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=4, num_experts=0,
        dense_ffn_hidden_size=40, attention="mla", mla=MLAConfig(q_lora_rank, 24, 16, 8, 20),
    )  # fmt: skip
    h, q = 32, 4 * (16 + 8)
    queries = [(h, 10), (10, q)] if q_lora_rank else [(h, q)]
    attention = [*queries, (h, 24 + 8), (24, 4 * (16 + 20)), (4 * 20, h)]
    shapes = [(h, 256)] + 2 * [*attention, (h, 40), (h, 40), (40, h)]
    tokens, seq_length = 10, 7
    counted = forward_flops_per_token(model, MOE, seq_length, 200).realised
    # Scores over 24 values a head, then weighted sums of 20.
    causal = 2 * 4 * 2 * (24 + 20) * (seq_length + 1) // 2
    assert tokens * (counted - causal) == matmul_flops(tokens, shapes, backward=False)


def test_causal_attention_counts_the_lower_triangle() -> None:
    model, s = ModelConfig(), 64
    long = forward_flops_per_token(model, MOE, s, 128).realised
    longer = forward_flops_per_token(model, MOE, 2 * s, 128).realised
    pairs = s * (s + 1) // 2  # a token reads itself and what precedes it
    queries, layers = model.hidden_size, model.num_layers
    attention = layers * 2 * 2 * queries * pairs // s
    assert longer - long == layers * 2 * 2 * queries * (2 * s + 1) // 2 - attention


def test_selection_lowers_the_ideal_count_only() -> None:
    model = ModelConfig()
    moe = forward_flops_per_token(model, MOE, 64, 1000)
    mone = forward_flops_per_token(model, QUARTER, 64, 1000)
    visited = model.num_layers * 2 * 3 * model.hidden_size * model.expert_ffn_hidden_size
    assert mone.realised == moe.realised
    # At 1/4 half of an expert's work is left: all of the gate, a quarter of up and down.
    assert moe.ideal - mone.ideal == 2 * visited // 2


def test_forward_is_close_to_two_per_activated_parameter() -> None:
    config = compose(["experiment=qwen3_30b_a3b_mone"])
    model, vocab = config.model, config.model.vocab_size
    parameters = count_parameters(model, config.mone, vocab)
    matrices = parameters.activated_gate_counted - parameters.embedding - parameters.norms
    flops = forward_flops_per_token(model, config.mone, 0, vocab).ideal
    own_key = model.num_layers * 4 * 32 * 128 // 2  # (s + 1) / 2 at s = 0
    assert flops - own_key == 2 * matrices


def test_a_step_is_its_tokens() -> None:
    config = compose(["experiment=tiny_mone"])
    token = training_flops_per_token(config.model, config.mone, 64, 512)
    step = flops_per_step(config, 512)
    assert (step.ideal, step.realised) == (8 * 64 * token.ideal, 8 * 64 * token.realised)
