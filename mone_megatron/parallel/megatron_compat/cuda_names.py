"""Gives ``torch.cuda``'s functions, and ``Tensor.cuda``, a meaning on a CPU.

megatron-core calls them in every forward and backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class _Stream:
    """Has a CUDA stream's interface, on a device whose work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Does nothing: CPU work is in order, so there is nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Does nothing: CPU work is in order, so there is nothing to wait for."""

    def record_event(self, event: _Event | None = None) -> _Event:
        """Returns an event that has already happened."""
        return event or _Event()

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""


class _Event:
    """Has a CUDA event's interface, on a device whose work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Does nothing: there is nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Does nothing: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Does nothing: there is nothing to wait for."""


_THE_STREAM = _Stream()
_CPU = torch.device("cpu")


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _nothing() -> Callable[..., None]:
    """Returns a new function that does nothing: torch._dynamo refuses one function twice."""
    return lambda *args, **kwargs: None


# torch.cuda name -> CPU meaning.
CUDA_REDIRECTIONS: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _stream_context,
    "current_stream": lambda device=None: _THE_STREAM,
    "default_stream": lambda device=None: _THE_STREAM,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
}


def _stay(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Stands in for ``Tensor.cuda`` and returns the tensor as it is.

    megatron-core moves embeddings that are tied over pipeline stages by it when it builds them.
    """
    return tensor


def is_redirected() -> bool:
    """Returns whether this process's ``torch.cuda`` means the CPU already."""
    return torch.cuda.current_device is CUDA_REDIRECTIONS["current_device"]


def redirect_cuda_names() -> None:
    """Puts the CPU's meanings in the place of ``torch.cuda``'s functions, for good."""
    for name, replacement in CUDA_REDIRECTIONS.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = _stay  # type: ignore[method-assign, assignment]
