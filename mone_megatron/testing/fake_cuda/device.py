"""Replaces ``torch.cuda`` without CUDA: streams and events wait for nothing, eight fake H100s."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mone_megatron.testing.fake_cuda.findings import WAIT, Findings

GPUS = 8


class _Properties:
    multi_processor_count = 132
    total_memory = 80 << 30
    major, minor = 9, 0
    name = "Fake H100"


def install_device(findings: Findings) -> None:
    """Replaces what ``torch.cuda`` would do on a device, for the rest of this process."""

    class Event:
        def __init__(self, *args: object, **options: object) -> None: ...
        def record(self, stream: object = None) -> None: ...
        def wait(self, stream: object = None) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            findings.note(WAIT, "event.synchronize")

        def elapsed_time(self, other: object) -> float:
            return 1.0

    class Stream:
        cuda_stream = 0

        def __init__(self, *args: object, **options: object) -> None: ...
        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *error: object) -> None: ...
        def wait_stream(self, stream: object) -> None: ...
        def wait_event(self, event: object) -> None: ...
        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            findings.note(WAIT, "stream.synchronize")

    stream, seeds = Stream(), torch.zeros(16, dtype=torch.uint8)
    properties = _Properties()
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: GPUS,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "synchronize": lambda device=None: findings.note(WAIT, "cuda.synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_rng_state": lambda device=None: seeds,
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "default_generators": (torch.Generator(),) * GPUS,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    nn.Module._apply = _apply  # type: ignore[method-assign]


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Replaces ``nn.Module._apply`` and makes new parameters: a FakeTensor cannot change its device
    in place.
    """
    for child in module.children():
        child._apply(change)
    for name, old in module._parameters.items():
        if old is None:
            continue
        with torch.no_grad():
            new = change(old)
        if new is not old:
            changed = nn.Parameter(new.detach(), old.requires_grad)
            for key, value in old.__dict__.items():
                if key not in changed.__dict__ and "fake" not in key and "memo" not in key:
                    changed.__dict__[key] = value
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
