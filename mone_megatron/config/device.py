"""Defines the group ``device``: the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from mone_megatron.config.group import Group
from mone_megatron.config.marks import AtLeast


@dataclass(frozen=True)
class DeviceConfig(Group):
    """Says what hardware a run uses, and which kernels."""

    kind: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes CUDA when there is a GPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on CUDA and fp32 on CPU."""
    kernels: Literal["auto", "reference"] = "auto"
    """The kernels of the experts' neurons: `auto` takes the fastest (Triton's on CUDA),
    `reference` plain torch, to compare with."""
    grouped_gemm: Literal["torch", "transformer_engine"] = "torch"
    """Whose matrix products the experts use. Transformer Engine's (2.11 or later, CUDA) read the
    rows of each expert on the host; not run here."""
    threads: Annotated[int, AtLeast(0)] = 0
    """Compute threads of one process on CPU; 0 shares the cores among the processes of the
    machine."""
    timeout_seconds: Annotated[int, AtLeast(1)] = 600
    """Seconds without progress after which the run ends, naming the rank at fault
    (docs/reliability.md#hangs)."""

    def unread(self) -> Mapping[str, str]:
        """Returns the threads of CPUs on a GPU."""
        return {"threads": "device.kind=cuda"} if self.kind == "cuda" else {}
