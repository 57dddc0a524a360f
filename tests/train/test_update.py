"""An update clips and moves parameters as megatron-core's own step does, whose parts it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from mone_megatron.megatron_release import megatron_release
from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches

LATER = megatron_release() >= (0, 19, 0)
# Far below any norm: gradients are always clipped.
TINY = (
    "experiment=tiny_mone",
    "device=cpu",
    "model.num_layers=1",
    "train.seq_length=16",
    "optim.clip_grad=0.01",
    "parallel.expert=2",
)
PREDICTION = ("model.mtp.depth=1",)
# What goes no further than the layers of multi-token prediction is clipped by itself.
APART = (*PREDICTION, "megatron.transformer.mtp_detach_heads=true")
CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "whole": ("parallel.distributed_optimizer=false",),
    "bf16": ("device.dtype=bf16",),
    "muon": ("optim.name=muon", "parallel.distributed_optimizer=false"),
    "prediction": PREDICTION,
}
if LATER:
    CASES |= {
        "apart": APART,
        "apart_muon": (*APART, *CASES["muon"]),
        "apart_pp2": (*APART, "parallel.expert=1", "parallel.pipeline=2", "model.num_layers=2"),
    }


@dataclass(frozen=True)
class Update:
    """What one update gives on one rank."""

    norm: float
    # Norms of what is clipped by itself.
    apart: tuple[float, ...]
    parameters: dict[str, torch.Tensor]


def _update(overrides: tuple[str, ...], *, ours: bool) -> Update:
    dtype = torch.bfloat16 if "device.dtype=bf16" in overrides else torch.float32
    trainer = build_trainer([*TINY, *overrides], dtype=dtype)
    optimizer = trainer.state.optimizer
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    trainer.stepper._run(random_batches(trainer), forward_only=False)
    trainer.state.scheduler.step(1)
    norm = trainer.stepper._update() if ours else float(optimizer.step()[1])
    apart = tuple(getattr(optimizer, "grad_norms_by_group", {}).values())
    return Update(norm, apart, _parameters(trainer))


def _parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(trainer.chunks)
        for name, parameter in chunk.named_parameters()
    }


@pytest.mark.parametrize("case", CASES)
def test_parameters_move_as_by_megatron_cores_step(two_processes: Processes, case: str) -> None:
    by_rank, by_megatron = (two_processes.run(_update, CASES[case], ours=o) for o in (True, False))
    norms = set()
    for ours, theirs in zip(by_rank, by_megatron, strict=True):
        assert ours.parameters.keys() == theirs.parameters.keys()
        for name, parameter in ours.parameters.items():
            assert torch.equal(parameter, theirs.parameters[name]), name
        assert bool(theirs.apart) is case.startswith("apart")
        # Of all gradients, wherever they are clipped.
        assert ours.norm == math.hypot(theirs.norm, *theirs.apart)
        norms.add(ours.norm)
    assert len(norms) == 1
