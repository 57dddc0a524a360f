"""mone.memory=packed trains what mone.memory=full does, bit for bit."""

from __future__ import annotations

import pytest

from mone_megatron.testing.processes import Processes
from mone_megatron.testing.trainer import build_trainer, random_batches


def losses_and_norms(overrides: tuple[str, ...]) -> list[tuple[float, float]]:
    """Of three steps on the same batches."""
    trainer = build_trainer(
        ("experiment=tiny_mone", "device=cpu", *overrides), data_fingerprint="none"
    )
    results = []
    for _ in range(3):
        step = trainer.stepper.train(random_batches(trainer))
        results.append((step.loss, step.grad_norm))
    return results


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.expert=2", "train.recompute=selective"),
        (
            "parallel.tensor=2",
            "mone.apply_to=[routed,shared,dense]",
            "model.first_dense_layers=1",
            "model.shared_expert_ffn_hidden_size=64",
            "mone.balance.coeff=0",
        ),
    ],
    ids=["experts", "all_mlps"],
)
def test_the_same_training(two_processes: Processes, overrides: tuple[str, ...]) -> None:
    full, packed = (
        two_processes.run(losses_and_norms, (f"mone.memory={memory}", *overrides))
        for memory in ("full", "packed")
    )
    assert packed == full
    assert full[0][0] != full[0][2]
