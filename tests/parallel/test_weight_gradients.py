"""Gradients of linear layers and embeddings are added in place, as autograd makes them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor

from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches

SMALL = ["experiment=tiny_moe", "model.num_layers=2", "train.seq_length=16",
         "train.global_batch_size=4", "train.micro_batch_size=1"]  # fmt: skip


def _gradients(
    overrides: Sequence[str], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """This rank's gradients of a step, added in place and by autograd; layers with the former."""
    trainer = build_trainer(overrides, data_fingerprint="random tokens", dtype=dtype)
    (chunk,) = trainer.chunks
    layers = {
        name: module
        for name, module in chunk.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    in_place = [name for name, layer in layers.items() if layer.gradient_accumulation_fusion]
    embeddings = {
        name: module.weight
        for name, module in chunk.named_modules()
        if isinstance(module, VocabParallelEmbedding)
    }
    rows = [n for n, weight in embeddings.items() if getattr(weight, "adds_to_main_grad", False)]
    both = []
    for fused in (True, False):
        for name in in_place:
            layers[name].gradient_accumulation_fusion = fused
        for name in rows:
            embeddings[name].adds_to_main_grad = fused
        chunk.zero_grad_buffer()
        trainer.stepper._run(random_batches(trainer), forward_only=False)
        both.append({name: p.main_grad.clone() for name, p in chunk.named_parameters()})
        assert all(parameter.grad is None for parameter in chunk.parameters())
    return both[0], both[1], [name.rsplit(".", 1)[-1] for name in [*in_place, *rows]]


ALL = ["word_embeddings", "linear_proj", "linear_qkv", "output_layer"]


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["parallel.expert=2"], ALL),
        (["parallel.tensor=2", "model.qkv_bias=true", "train.recompute=full"], ALL),
        # What the embedding shares has two gradients.
        (["parallel.tensor=2", "model.tie_embeddings=true"], ["linear_proj", "linear_qkv"]),
        (["model.mtp.depth=2", "model.first_dense_layers=1"],
         ["eh_proj", "linear_fc1", "linear_fc2", *ALL]),
        (["parallel.overlap_grad_reduce=true"], []),
    ],
    ids=str,
)  # fmt: skip
def test_they_are_those_of_autograd(
    two_processes: Processes, overrides: list[str], layers: list[str]
) -> None:
    for ours, theirs, in_place in two_processes.run(_gradients, [*SMALL, *overrides]):
        assert sorted(set(in_place)) == sorted(layers)
        for name, expected in theirs.items():
            scale = float(expected.abs().max())
            assert scale > 0 or "expert" in name
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-6 * scale)


def test_bf16_is_left_to_megatron_core(two_processes: Processes) -> None:
    for ours, theirs, in_place in two_processes.run(_gradients, SMALL, torch.bfloat16):
        assert not in_place
        assert all(torch.equal(ours[name], expected) for name, expected in theirs.items())
