"""Says what there is to run a configuration on, as far as is known before a device is touched."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.config.device import DeviceConfig


@dataclass(frozen=True)
class Resources:
    """Describes the processes, devices and optional packages of a run.

    Attributes:
        world_size: the number of processes in all.
        local_world_size: processes on this machine; None where unknown.
        num_devices: CUDA devices of this machine; None where unknown.
        transformer_engine: whether Transformer Engine is there; None looks, without importing it.
        deep_ep: whether DeepEP is there; None looks, without importing it.
    """

    world_size: int
    local_world_size: int | None = None
    num_devices: int | None = None
    transformer_engine: bool | None = None
    deep_ep: bool | None = None

    def have_transformer_engine(self) -> bool:
        """Returns whether Transformer Engine is there."""
        if self.transformer_engine is None:
            return is_installed("transformer_engine")
        return self.transformer_engine

    def have_deep_ep(self) -> bool:
        """Returns whether DeepEP is there."""
        return is_installed("deep_ep") if self.deep_ep is None else self.deep_ep

    def have_hybrid_ep(self) -> bool:
        """Returns whether DeepEP is there in a version with HybridEP, by its source."""
        if self.deep_ep is not None:
            return self.deep_ep
        found = importlib.util.find_spec("deep_ep")
        if found is None or found.origin is None:
            return False
        return "HybridEPBuffer" in Path(found.origin).read_text(encoding="utf-8", errors="ignore")

    def is_cpu(self, device: DeviceConfig) -> bool:
        """Returns whether the run is known to be on CPUs."""
        return device.kind == "cpu" or (device.kind == "auto" and self.num_devices == 0)

    def is_bf16(self, device: DeviceConfig) -> bool:
        """Returns whether the run is known to compute in bf16."""
        if device.dtype != "auto":
            return device.dtype == "bf16"
        on_cuda = device.kind == "cuda" or (self.num_devices or 0) > 0
        return on_cuda and not self.is_cpu(device)


def is_installed(package: str) -> bool:
    """Returns whether a package is there, without importing it."""
    return importlib.util.find_spec(package) is not None
