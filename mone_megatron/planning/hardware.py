"""Lists GPUs and networks as their makers publish them, and what of it a run is taken to get.

The sources are NVIDIA's data sheets "A100 Tensor Core GPU" (80 GB SXM), "H100 Tensor Core GPU"
(SXM), "H200 Tensor Core GPU" (SXM), "DGX B200", and those of "DGX A100", "DGX H100", "DGX H200" and
"DGX B200" for the network: one adapter a GPU. Rates are those of bf16 without sparsity, half of
those with it. NVLink is printed for both directions together; here is one direction.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class GPU:
    """Describes one GPU in a machine of its maker's."""

    name: str
    # Dense bf16 operations a second.
    bf16_flops: float
    # Bytes; 1 GB is 10^9, which is a little less than the device reports.
    memory: float
    # Bytes a second.
    memory_bandwidth: float
    # Bytes a second and direction, to the GPUs of its node and (through its adapter) to others.
    nvlink: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9),
        GPU("H100", 989.4e12, 80e9, 3.35e12, 450e9, 50e9),
        GPU("H200", 989.4e12, 141e9, 4.8e12, 450e9, 50e9),
        GPU("B200", 2250e12, 180e9, 8e12, 900e9, 50e9),
    )
}


def find_gpu(name: str, **overrides: float | None) -> GPU:
    """Returns the GPU of a name (in any case); ``overrides`` that are not None replace its figures.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if name.upper() not in GPUS:
        raise ValueError(f"--gpu: {name!r} is not in the table; use one of {', '.join(GPUS)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(GPUS[name.upper()], **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Assumptions:
    """Holds the shares of the published figures that a run is taken to reach. They were not
    measured on GPUs here.
    """

    # Of the peak: projections, dense MLPs and the output layer; attention; the experts' grouped
    # products.
    matmul: float = 0.60
    attention: float = 0.45
    grouped: float = 0.40
    # Of the memory bandwidth: everything that is no matrix product.
    memory: float = 0.70
    # Of the links.
    links: float = 0.75
    # Of a byte that is kept for the backward pass, how often it crosses the memory: written, read
    # by the next operation and by the backward pass, its gradient written and read.
    passes: float = 5.0
    # The most loaded rank's share of routed tokens over the mean.
    imbalance: float = 1.2
    # Bytes for the CUDA context, NCCL, libraries and fragmentation.
    reserve: float = 4 * 2**30

    def check(self) -> None:
        """Checks that every figure lies in its range.

        Raises:
            ValueError: naming the flag.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            flag = "--reserve-gib" if field.name == "reserve" else f"--{field.name}"
            if field.name in ("matmul", "attention", "grouped", "memory", "links"):
                if not 0 < value <= 1:
                    raise ValueError(f"{flag}: {value:g} is outside (0, 1]; use a share like 0.5")
            elif field.name == "imbalance":
                if value < 1:
                    raise ValueError(f"{flag}: {value:g} is below 1, an even load; use 1 or more")
            elif value < 0:
                raise ValueError(f"{flag}: {value:g} is negative; use 0 or more")
