"""Has megatron-core's trackers of random states keep the CPU generator's, not CUDA's."""

from __future__ import annotations

import logging

import torch


def _cpu_get_rng_state(
    device: object = None, clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _cpu_set_rng_state(
    new_state: torch.Tensor, device: object = None, graph_safe: bool = False
) -> None:
    torch.set_rng_state(new_state)


def track_cpu_generator() -> None:
    """Lets megatron-core's tracker, which has two helpers for it, fork the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _cpu_get_rng_state
    random._set_cuda_rng_state = _cpu_set_rng_state
    # The tracker warns when the CPU generator moves inside a fork; here that generator is the
    # one being forked.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
