"""The random streams of a process: Python, NumPy, torch, CUDA, and megatron-core's tracker."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def random_state() -> dict[str, Any]:
    """Returns every random stream of this process, as tensors and numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937"
    version, python_words, python_gauss = random.getstate()
    state = {
        "python_version": version,
        "python_words": torch.tensor(python_words, dtype=torch.int64),
        "python_gauss": python_gauss,
        "numpy_words": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "tracker": {name: _plain(state) for name, state in _tracked().items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _tracked() -> dict[str, torch.Tensor | torch.Generator]:
    """Returns megatron-core's own: beside CUDA graphs they are generators that a graph holds."""
    tracked: dict[str, torch.Tensor | torch.Generator]
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    return tracked


def _plain(state: torch.Tensor | torch.Generator) -> torch.Tensor:
    return state.get_state() if isinstance(state, torch.Generator) else state


def missing_streams(state: dict[str, Any]) -> list[str]:
    """Returns the streams that a saved state lacks."""
    return sorted(set(random_state()) - set(state) - {"cuda"})


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on with the streams of :func:`random_state`."""
    words = tuple(state["python_words"].tolist())
    random.setstate((state["python_version"], words, state["python_gauss"]))
    position, has_gauss, cached = state["numpy_rest"]
    keys = state["numpy_words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), float(cached)))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracked = _tracked()
    for name, saved in state["tracker"].items():
        held = tracked.get(name)
        if isinstance(held, torch.Generator):
            # In place: graphs that were made draw from this object.
            held.set_state(saved)
        else:
            tracked[name] = saved
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
