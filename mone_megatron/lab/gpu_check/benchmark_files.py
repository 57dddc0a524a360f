"""Says in a few numbers what the files of benchmarks hold, beside the bounds of this GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mone_megatron.planning.hardware import GPUS

# Bytes of a bf16 score that is read, and of its place in the mask.
_BYTES_OF_A_SCORE = 3


def select(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns, for each width, the time beside the memory bound and beside torch's."""
    gpu = next((gpu for name, gpu in GPUS.items() if name in written["hardware"]), None)
    found = {}
    for cell in written["result"]:
        milliseconds = cell["ours_milliseconds"]["median"]
        words = f"{milliseconds:.3g} ms"
        if gpu is not None:
            bound = 1e3 * _BYTES_OF_A_SCORE * cell["rows"] * cell["neurons"] / gpu.memory_bandwidth
            words += f", {milliseconds / bound:.3g} times the memory bound"
        theirs = cell["topk_scatter_over_ours"]["median"]
        found[f"f={cell['neurons']}:"] = f"{words}, torch's {theirs:.3g} times as long"
    return found


def layer(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how long each form of a layer takes, in times of the plain one."""
    return {
        f"{cost['name']}:": f"{cost['over_moe']['median']:.3g} times MoE"
        for cost in written["result"]["costs"]
        if cost["name"] != "MoE"
    }


def decode(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how much faster decoding is than with all rows, and what the bytes read allow."""
    return {
        f"batch {cell['tokens']}, r={cell['keep_ratio']:g}:": (
            f"{cell['speed_up']['median']:.3g} times as fast of {cell['limit']:.3g}"
        )
        for cell in written["result"]["cells"]
    }


def registers(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how many kernels were compiled, and which are nearest to their limits."""
    kernels = written["result"]
    most = max(kernels, key=lambda kernel: kernel["registers"])
    slowest = max(kernels, key=lambda kernel: kernel["issue_ratio"])
    return {
        "kernels": len(kernels),
        "bytes spilled": sum(kernel["spilled"] for kernel in kernels),
        "most registers": f"{most['registers']} ({most['kernel']})",
        "most times the memory bound, a model": (
            f"{slowest['issue_ratio']:.3g} ({slowest['kernel']})"
        ),
    }
