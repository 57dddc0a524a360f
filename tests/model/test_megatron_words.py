"""megatron-core's refusals reach users in our words, whatever it refuses."""

from __future__ import annotations

import pytest
import torch

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config, ModelConfig, ParallelConfig, RouterConfig
from mone_megatron.model.megatron_words import in_our_words, megatron_refusals
from mone_megatron.model.transformer import transformer_config

# Not validated: what megatron-core itself says about each.
REFUSED: dict[str, Config] = {
    "model.router.pre_softmax": Config(model=ModelConfig(experts_per_token=1)),
    "model.router.num_groups": Config(
        model=ModelConfig(router=RouterConfig(group_topk=2, num_groups=0))
    ),
    "model.router.score_function": Config(model=ModelConfig(router=RouterConfig(expert_bias=True))),
    "parallel.tensor": Config(
        model=ModelConfig(num_attention_heads=3, hidden_size=96),
        parallel=ParallelConfig(tensor=2),
    ),
    "model.num_experts": Config(
        model=ModelConfig(num_experts=0), parallel=ParallelConfig(expert=2)
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_refusal_names_our_key_and_no_option_of_theirs(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        transformer_config(REFUSED[key], dtype=torch.float32, on_cpu=True, sequence_parallel=False)
    (line,) = caught.value.problems
    assert key in line
    assert "megatron-core refuses the configuration" in line
    for foreign in ("--", "moe_", "moe-", "model_parallel_size", "num_moe"):
        assert foreign not in line, line


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Please use --moe-router-pre-softmax when topk is 1.",
         "Please use model.router.pre_softmax when topk is 1."),
        ("moe_router_group_topk (4) over\n moe_router_num_groups (2)",
         "model.router.group_topk (4) over model.router.num_groups (2)"),
        ("set --moe-router-dtype=fp32", "set model.router.dtype=fp32"),
        ("please set '--disable-bias-linear' instead",
         "please set 'megatron-core's disable bias linear' instead"),
        ("a self-made in-place rule", "a self-made in-place rule"),
    ],
)  # fmt: skip
def test_names_are_translated(theirs: str, ours: str) -> None:
    assert in_our_words(theirs) == ours


def test_an_error_of_ours_stays_as_it_is() -> None:
    with pytest.raises(ConfigError) as caught, megatron_refusals():
        raise ConfigError("model.head_dim: 3 is odd; use 4")
    assert caught.value.problems == ("model.head_dim: 3 is odd; use 4",)
