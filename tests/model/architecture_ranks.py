"""Training steps of a tiny model on the ranks of a layout; run in spawned processes."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

from megatron.core.tensor_parallel import ColumnParallelLinear

from mone_megatron.model.specs import TorchSpecProvider
from mone_megatron.testing.trainer import build_trainer, random_batches
from mone_megatron.train.resume.checkpointer import Position


def train_and_save(overrides: Sequence[str], steps: int) -> list[tuple[float, float]]:
    """Take up a checkpoint if ``overrides`` name one, train, and save the last step.

    Returns:
        Loss and gradient norm of each step, all on the same random tokens.
    """
    trainer = build_trainer(overrides, data_fingerprint="random tokens")
    start = trainer.checkpointer.resume()
    results = [trainer.stepper.train(random_batches(trainer)) for _ in range(steps)]
    trainer.checkpointer.save(Position(start.step + steps))
    return [(result.loss, result.grad_norm) for result in results]


def train_with_column_parallel_down_projections(
    overrides: Sequence[str], steps: int
) -> list[tuple[float, float]]:
    """As :func:`train_and_save`, with the other layers that megatron-core's MLA takes."""
    with patch.object(TorchSpecProvider, "linear", lambda _: ColumnParallelLinear):
        return train_and_save(overrides, steps)
