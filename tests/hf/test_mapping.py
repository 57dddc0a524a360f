"""The table of tensors: both directions, bitwise, for any shape; and the choice of architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_megatron.config.load import CONF_DIR, compose
from mone_megatron.config.schema import MLAConfig, ModelConfig, RouterConfig
from mone_megatron.hf.architectures import BY_TYPE, FUSED, MONE, STOCK, ExpertNames, choose
from mone_megatron.hf.mapping import rules


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 3]))
    layers = draw(st.integers(1, 3))
    experts = draw(st.sampled_from([0, 2, 5]))
    latent = draw(st.booleans())
    shared = draw(st.sampled_from([0, 6])) if experts else 0
    return ModelConfig(
        num_layers=layers,
        hidden_size=12,
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        dense_ffn_hidden_size=draw(st.integers(1, 9)),
        num_experts=experts,
        experts_per_token=min(2, experts) or 1,
        expert_ffn_hidden_size=draw(st.integers(1, 7)),
        shared_expert_ffn_hidden_size=shared,
        shared_expert_gate=bool(shared) and draw(st.booleans()),
        first_dense_layers=draw(st.integers(0, layers - 1)) if experts else 0,
        vocab_padding_multiple=draw(st.sampled_from([1, 8])),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qk_norm_scope=draw(st.sampled_from(["head", "all_heads"])),
        qkv_bias=draw(st.booleans()),
        attention="mla" if latent else "gqa",
        mla=MLAConfig(draw(st.sampled_from([0, 3])), 5, 2, 4, 3),
        router=RouterConfig(score_function="sigmoid", expert_bias=draw(st.booleans())),
    )


@settings(max_examples=60, deadline=None)
@given(
    model=models(),
    vocab_size=st.integers(1, 20),
    experts=st.sampled_from([FUSED, ExpertNames("split"), BY_TYPE["mixtral"].experts]),
)
def test_there_and_back_is_bitwise(
    model: ModelConfig, vocab_size: int, experts: ExpertNames
) -> None:
    theirs: set[str] = set()
    rows: dict[str, list[int]] = {}
    for rule in rules(model, vocab_size, MONE, experts):
        ours = torch.randn(rule.our_shape)
        if rule.ours in ("embedding.word_embeddings.weight", "output_layer.weight"):
            ours[vocab_size:] = 0
        exported = rule.export(ours)
        names = {name for name, _ in exported}
        assert len(names) == len(exported)
        assert not names & theirs
        theirs |= names
        assert all(tensor.is_contiguous() for _, tensor in exported)
        back = rule.take(tuple(tensor for _, tensor in exported))
        assert back.is_contiguous()
        assert torch.equal(back, ours)
        if rule.row is not None:
            rows.setdefault(rule.ours, []).append(rule.row)
    # Every expert of a tensor that is handled expert by expert.
    assert all(sorted(found) == list(range(model.num_experts)) for found in rows.values())


def test_queries_keys_and_values_of_a_group_lie_together() -> None:
    """The one rule with an order of its own, against a loop."""
    model = ModelConfig(hidden_size=8, num_attention_heads=4, num_query_groups=2, head_dim=3)
    rule = next(r for r in rules(model, 4, MONE) if r.ours.endswith("linear_qkv.weight"))
    ours = torch.arange(24 * 8.0).view(24, 8)
    q, k, v = (tensor for _, tensor in rule.export(ours))
    heads = list(ours.split(3))  # of group 0: q q k v, of group 1: q q k v
    assert torch.equal(q, torch.cat([heads[0], heads[1], heads[4], heads[5]]))
    assert torch.equal(k, torch.cat([heads[2], heads[6]]))
    assert torch.equal(v, torch.cat([heads[3], heads[7]]))


EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shipped_experiments_export_as(name: str) -> None:
    config = compose([f"experiment={name}"])
    chosen = choose(config.model, mone=config.mone.enabled).model_type
    if config.mone.enabled:
        assert chosen == "mone"
    elif name.startswith("flame"):
        assert chosen == "mone"  # shared experts without a gate beside GQA: no stock class
    else:
        stock = {"mixtral": "mixtral", "olmoe": "olmoe", "deepseek": "deepseek_v2"}
        expected = next((t for start, t in stock.items() if name.startswith(start)), "qwen3_moe")
        assert chosen == expected


BASE = ModelConfig(qk_norm=False)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BASE, "mixtral"),
        (replace(BASE, qk_norm=True), "qwen3_moe"),
        (replace(BASE, qk_norm=True, qk_norm_scope="all_heads"), "olmoe"),
        (replace(BASE, num_experts=0, qk_norm=True), "qwen3"),
        (replace(BASE, num_experts=0), "llama"),
        (replace(BASE, num_experts=0, qkv_bias=True), "qwen2"),
        (
            replace(
                BASE,
                qkv_bias=True,
                shared_expert_ffn_hidden_size=64,
                shared_expert_gate=True,
            ),
            "qwen2_moe",
        ),
        (replace(BASE, router=RouterConfig(score_function="sigmoid")), "mone"),
        (replace(BASE, qk_norm=True, qkv_bias=True), "mone"),
        (replace(BASE, qk_norm=True, shared_expert_ffn_hidden_size=64), "mone"),
        (replace(BASE, router=RouterConfig(scaling_factor=2.0, pre_softmax=True)), "mone"),
    ],
)
def test_the_first_stock_architecture_that_holds_a_model(model: ModelConfig, expected: str) -> None:
    assert choose(model, mone=False).model_type == expected
    assert choose(model, mone=True).model_type == "mone"


def test_what_an_architecture_lacks_is_said() -> None:
    model = replace(BASE, qkv_bias=True)
    assert BY_TYPE["mixtral"].lacks(model, mone=True) == ["mone=True", "qkv_bias=True"]
    assert all(one.lacks(model, mone=True) for one in STOCK)
