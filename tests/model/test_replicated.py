"""Weights that every rank has whole, with the mark of split ones that Transformer Engine leaves."""

from __future__ import annotations

import pytest
import torch
from replicated_ranks import weights_and_norms
from torch import nn

from mone_megatron.model.replicated import mark_replicated
from mone_megatron.testing.processes import Processes, run_in_processes

LATENT = (
    "experiment=tiny_mone",
    "device=cpu",
    "model.num_layers=1",
    "train.seq_length=16",
    "model.attention=mla",
    "model.num_query_groups=4",
    "model.qk_norm=false",
    "model.mla.q_lora_rank=24",
    "model.mla.kv_lora_rank=32",
    "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_rope_head_dim=8",
    "model.mla.v_head_dim=16",
)


def test_latent_attention_begins_and_learns_alike_on_every_rank(two_processes: Processes) -> None:
    split = (*LATENT, "parallel.tensor=2")
    expected, results = run_in_processes(1, weights_and_norms, LATENT, False)[0]
    assert len(expected) == 2
    for weights, same in two_processes.run(weights_and_norms, split, True):
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)
        for (loss, norm), (alone, alone_norm) in zip(same, results, strict=True):
            assert loss == pytest.approx(alone, rel=1e-5)
            assert norm == pytest.approx(alone_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "split"), [("column", True), ("row", True), (None, False), ("duplicated", False)]
)
def test_the_mode_decides(mode: str | None, split: bool) -> None:
    layer = nn.Linear(2, 2)
    layer.parallel_mode = mode  # type: ignore[assignment]
    layer.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    mark_replicated(nn.Sequential(layer))
    assert layer.weight.tensor_model_parallel is split  # type: ignore[attr-defined]


def test_modules_without_a_mode_keep_their_marks() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    mark_replicated(nn.Sequential(layer))
    assert layer.weight.tensor_model_parallel is True  # type: ignore[attr-defined]
