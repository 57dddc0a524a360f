"""Models whose linear layers are marked as Transformer Engine marks them; in spawned processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from megatron.core.post_training.modelopt.layers import Linear
from torch import Tensor

from mone_megatron.testing.trainer import build_trainer, random_batches


def _as_transformer_engine(make: Callable[..., None]) -> Callable[..., None]:
    """Returns a constructor of a layer that every rank has whole, with that mark and mode."""

    def marked(self: Linear, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.parallel_mode = None
        for parameter in self.parameters():
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]

    return marked


def weights_and_norms(
    overrides: Sequence[str], marked: bool
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Returns this rank's initial down projections, and losses and gradient norms of two steps."""
    # megatron-core takes this very class, and no other.
    make = Linear.__init__
    with patch.object(Linear, "__init__", _as_transformer_engine(make) if marked else make):
        trainer = build_trainer(overrides, data_fingerprint="random tokens")
    weights = {
        name: parameter.detach().clone()
        for name, parameter in trainer.chunks[0].named_parameters()
        if "_down_proj.weight" in name
    }
    results = [trainer.stepper.train(random_batches(trainer)) for _ in range(2)]
    return weights, [(result.loss, result.grad_norm) for result in results]
