"""Attention that other families have: equal to transformers' own, and the same in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architecture_ranks import train_and_save, train_with_column_parallel_down_projections
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from test_models import build, tiny
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from transformers import DeepseekV2Config, OlmoeConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.olmoe import modeling_olmoe

from mone_megatron.config.schema import MLAConfig, RopeScalingConfig
from mone_megatron.testing.processes import Processes

STEPS = 3
RUN = [
    "experiment=tiny_moe",
    "model.num_layers=2",
    "model.first_dense_layers=1",
    "train.seq_length=16",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    f"train.steps={STEPS}",
    "optim.lr=0.001",
    "logging.wandb.mode=disabled",
]
MLA = [
    "model.attention=mla",
    "model.num_query_groups=4",
    "model.qk_norm=false",
    "model.mla.kv_lora_rank=24",
    "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_rope_head_dim=8",
    "model.mla.v_head_dim=20",
]
ARCHITECTURES = {
    "norms_over_all_heads": ["model.qk_norm_scope=all_heads"],
    "mla": MLA,
    "mla_with_query_latent_and_yarn": [
        *MLA,
        "model.mla.q_lora_rank=12",
        "model.rope_scaling.type=yarn",
        "model.rope_scaling.factor=40",
        "model.rope_scaling.original_max_position=8",
        "model.rope_scaling.mscale=0.707",
        "model.rope_scaling.mscale_all_dim=0.707",
    ],
}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Processes]:
    """A process of its own: this one's state of megatron-core is other tests'."""
    with Processes(1) as processes:
        yield processes


def tensors(folder: Path) -> dict[str, Tensor]:
    """Weights and moments of the last step saved in ``folder``, by name."""
    step = folder / "checkpoints" / f"step_{STEPS:08d}"
    loaded = _load_state_dict_from_keys(None, storage_reader=FileSystemReader(step))
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensor_parallelism_trains_and_saves_the_same_model(
    one_rank: Processes, two_processes: Processes, tmp_path: Path, name: str
) -> None:
    run = [*RUN, *ARCHITECTURES[name]]
    split = "parallel.tensor=2"

    def place(folder: str, after: str = "") -> list[str]:
        step = tmp_path / after / "checkpoints" / f"step_{STEPS:08d}"
        resume = f"checkpoint.resume={step if after else 'never'}"
        return [f"run.dir={tmp_path / folder}", resume]

    (whole,) = one_rank.run(train_and_save, [*run, *place("one")], STEPS)
    for results in two_processes.run(train_and_save, [*run, split, *place("two")], STEPS):
        for (loss, grad_norm), (expected_loss, expected_norm) in zip(results, whole, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert grad_norm == pytest.approx(expected_norm, rel=1e-6)
    assert whole[-1][0] < whole[0][0]
    # Each takes up the other's checkpoint, and saves the same tensors bit for bit.
    one_rank.run(train_and_save, [*run, *place("two_on_one", after="two")], 0)
    two_processes.run(train_and_save, [*run, split, *place("one_on_two", after="one")], 0)
    for folder, source in (("two_on_one", "two"), ("one_on_two", "one")):
        moved, expected = tensors(tmp_path / folder), tensors(tmp_path / source)
        assert moved.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(moved[key], expected[key])] == []


def test_column_parallel_down_projections_lose_gradients(
    one_rank: Processes, two_processes: Processes, tmp_path: Path
) -> None:
    # Why ours are whole on every rank; when this fails, either will do.
    run = [*RUN, *MLA, f"run.dir={tmp_path}"]
    ((loss, grad_norm),) = one_rank.run(train_and_save, run, 1)[0]
    split = [*run, "parallel.tensor=2"]
    train = train_with_column_parallel_down_projections
    ((split_loss, split_norm),) = two_processes.run(train, split, 1)[0]
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert abs(split_norm - grad_norm) > 5e-6 * grad_norm


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("groups", [2, 4])
def test_norms_over_all_heads_equal_olmoes(groups: int) -> None:
    config = tiny(qk_norm_scope="all_heads", num_query_groups=groups)
    attention = build(config).decoder.layers[0].self_attention
    theirs_config = OlmoeConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=groups,
        rms_norm_eps=config.model.norm_eps,
        attn_implementation="eager",
    )
    theirs = modeling_olmoe.OlmoeAttention(theirs_config, 0)
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        for norm in (attention.q_layernorm, attention.k_layernorm):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        for matrix in (attention.linear_qkv, attention.linear_proj):
            matrix.weight.normal_(0.0, 0.125, generator=generator)
        # A group holds its queries, then its key and its value.
        by_group = attention.linear_qkv.weight.view(groups, 4 // groups + 2, 16, 64)
        theirs.q_proj.weight.copy_(by_group[:, :-2].reshape(-1, 64))
        theirs.k_proj.weight.copy_(by_group[:, -2].reshape(-1, 64))
        theirs.v_proj.weight.copy_(by_group[:, -1].reshape(-1, 64))
        theirs.o_proj.weight.copy_(attention.linear_proj.weight)
        theirs.q_norm.weight.copy_(attention.q_layernorm.weight)
        theirs.k_norm.weight.copy_(attention.k_layernorm.weight)
    x_BSH = torch.randn(2, 16, 64, generator=generator)
    rotary = build(config).rotary_pos_emb(16)
    ours, _ = attention(x_BSH.transpose(0, 1), None, rotary_pos_emb=rotary)
    expected = _attend(theirs, x_BSH, modeling_olmoe.OlmoeRotaryEmbedding(theirs_config))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours.transpose(0, 1), expected, rtol=0, atol=1e-5)


DEEPSEEK_V2 = RopeScalingConfig("yarn", 40.0, 4096, 32.0, 1.0, 0.707, 0.707)
YARNS = {
    "none": (RopeScalingConfig(), 96),
    "yarn": (RopeScalingConfig("yarn", 40.0, 32, 32.0, 1.0, 0.707, 0.707), 96),
    "yarn_of_two_scales": (RopeScalingConfig("yarn", 4.0, 32, 16.0, 2.0, 1.0, 0.5), 96),
    "yarn_without_mscale": (RopeScalingConfig("yarn", 4.0, 32), 96),
    "deepseek_v2": (DEEPSEEK_V2, 4400),
}


def deepseeks_config(mla: MLAConfig, scaling: RopeScalingConfig) -> DeepseekV2Config:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling.type == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        if scaling.mscale:
            rope |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return DeepseekV2Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=mla.q_lora_rank or None,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rope_parameters=rope,
        max_position_embeddings=8192,
        attn_implementation="eager",
    )


# Of one attention layer: ours and transformers'. Nothing is permuted.
DEEPSEEKS_NAMES = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("q_lora_rank", [0, 12])
@pytest.mark.parametrize("name", YARNS)
def test_mla_equals_deepseeks(name: str, q_lora_rank: int) -> None:
    scaling, length = YARNS[name]
    mla = MLAConfig(q_lora_rank, 24, 16, 8, 20)
    config = tiny(attention="mla", num_query_groups=4, qk_norm=False, mla=mla, rope_scaling=scaling)
    attention = build(config).decoder.layers[0].self_attention
    theirs_config = deepseeks_config(mla, scaling)
    theirs = modeling_deepseek_v2.DeepseekV2Attention(theirs_config, 0)
    generator = torch.Generator().manual_seed(length + q_lora_rank)
    copied = set()
    with torch.no_grad():
        for ours_name, parameter in attention.named_parameters():
            module = ours_name.removesuffix(".weight")
            if "norm" in module:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:  # scores that differ: each value of a row matters
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            copied.add(f"{DEEPSEEKS_NAMES[module]}.weight")
            theirs.get_parameter(f"{DEEPSEEKS_NAMES[module]}.weight").copy_(parameter)
    assert copied == dict(theirs.named_parameters()).keys()
    x_BSH = torch.randn(1, length, 64, generator=generator)
    with torch.no_grad():
        ours, _ = attention(x_BSH.transpose(0, 1), None)
        rotary = modeling_deepseek_v2.DeepseekV2RotaryEmbedding(theirs_config)
        expected = _attend(theirs, x_BSH, rotary)
    assert expected[:, length // 2 :].abs().max() > 0.1
    torch.testing.assert_close(ours.transpose(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("chosen", "same"), [(2, True), (4, False)])
def test_groups_are_deepseek_v2s_only_where_each_gives_one_expert(chosen: int, same: bool) -> None:
    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=chosen,
        n_group=8,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.0,
    )
    router = modeling_deepseek_v2.DeepseekV2TopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Narrow: where one expert outweighs all others the sum of two ranks like the best.
        router.weight.normal_(0.0, 0.1, generator=generator)
        logits, _, theirs = router(torch.randn(50, 16, generator=generator))
    _, ours = group_limited_topk(logits.softmax(-1), chosen, 50, 16, 8, 2)
    equal = theirs.sort(-1).values.eq(ours.sort(-1).values).all(-1)
    assert bool(equal.all()) == same


def _attend(attention: torch.nn.Module, x_BSH: Tensor, rotary: torch.nn.Module) -> Tensor:
    """transformers' attention of positions 0, 1, ... with a causal mask."""
    length = x_BSH.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    positions = torch.arange(length)[None]
    output, _ = attention(x_BSH, position_embeddings=rotary(x_BSH, positions), attention_mask=mask)
    return output
