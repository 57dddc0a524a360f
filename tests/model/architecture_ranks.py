"""Training steps of a tiny model on the ranks of a layout; run in spawned processes."""

from __future__ import annotations

from collections.abc import Sequence

from mone_megatron.testing.trainer import build_trainer, random_batches
from mone_megatron.train.checkpointer import Position


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
