"""Tells what the machine has, and whether the first operations work.

It prints JSON as its last line.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    "megatron-core",
    "triton",
    "transformer-engine",
    "nvidia-nccl-cu13",
    "nvidia-nccl-cu12",
)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _on_gpu() -> dict[str, object]:
    """Returns what the GPU is, after a product, a grouped product and a Triton kernel on it."""
    import torch.nn.functional as F

    properties = torch.cuda.get_device_properties(0)
    rows = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 128, 64, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([64, 64, 200, 256], dtype=torch.int32, device="cuda")
    product = F.grouped_mm(rows, weight, offs=ends)
    torch.testing.assert_close(product[:64], rows[:64] @ weight[0], rtol=2e-2, atol=2e-1)
    facts: dict[str, object] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    if importlib.util.find_spec("triton") is not None:
        from mone_megatron.kernels import fused

        device = torch.device("cuda")
        facts["kernel's bf16 SiLU is torch's in every bit"] = fused.scores_equal_torch(
            F.silu, device
        )
    return facts


def main() -> None:
    """Prints the facts."""
    facts: dict[str, object] = {"versions": _versions()}
    if torch.cuda.is_available():
        facts |= _on_gpu()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
