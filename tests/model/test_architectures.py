"""Attention that other families have: equal to transformers' own, and the same in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architecture_ranks import train_and_save
from test_models import build, tiny
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe

from mone_megatron.testing.processes import Processes

STEPS = 3
RUN = [
    "experiment=tiny_moe",
    "model.first_dense_layers=1",
    "train.seq_length=16",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    f"train.steps={STEPS}",
    "optim.lr=0.001",
    "logging.wandb.mode=disabled",
]
ARCHITECTURES = {
    "norms_over_all_heads": ["model.qk_norm_scope=all_heads"],
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
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours.transpose(0, 1), expected, rtol=0, atol=1e-5)


def _attend(attention: torch.nn.Module, x_BSH: Tensor, rotary: torch.nn.Module) -> Tensor:
    """transformers' attention of positions 0, 1, ... with a causal mask."""
    length = x_BSH.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    positions = torch.arange(length)[None]
    output, _ = attention(x_BSH, position_embeddings=rotary(x_BSH, positions), attention_mask=mask)
    return output
