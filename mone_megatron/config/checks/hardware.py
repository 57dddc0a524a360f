"""Checks the configuration against the devices and the packages that there are."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.wording import is_multiple, near_multiples
from mone_megatron.counting import counted
from mone_megatron.methods.gates import GATES

# torch.nn.functional.grouped_mm wants every stride to be a multiple of 16 bytes.
_GROUPED_MM_ALIGNMENT = 16


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields what the devices and packages cannot do."""
    yield from _devices(config, resources)
    yield from _context(config, resources)
    yield from _grouped_gemm(config, resources)
    yield from _overlaps(config, resources)
    yield from _alignment(config, resources)


def _devices(config: Config, resources: Resources) -> Iterator[str]:
    here, devices = resources.local_world_size, resources.num_devices
    if config.device.kind == "cuda" and devices == 0:
        yield "device.kind: cuda, and this machine has no CUDA device; use device.kind=cpu"
    elif not resources.is_cpu(config.device) and devices and here and here > devices:
        yield (
            f"device.kind: {counted(here, 'process')} on this machine and "
            f"{counted(devices, 'CUDA device')}; run {counted(devices, 'process')} or fewer, or "
            "device.kind=cpu"
        )


def _context(config: Config, resources: Resources) -> Iterator[str]:
    context = config.parallel.context
    if context > 1 and config.model.attention == "mla":
        yield (
            f"parallel.context: {context} with model.attention=mla is not supported; "
            "use parallel.context=1"
        )


def _grouped_gemm(config: Config, resources: Resources) -> Iterator[str]:
    if config.device.grouped_gemm != "transformer_engine":
        return
    if resources.is_cpu(config.device):
        yield "device.grouped_gemm: Transformer Engine needs CUDA; use torch on a CPU"
    elif not resources.have_transformer_engine():
        yield (
            "device.grouped_gemm: Transformer Engine is not installed; use torch, or install "
            "transformer_engine"
        )


def _overlaps(config: Config, resources: Resources) -> Iterator[str]:
    overlaps = {
        "parallel.overlap_grad_reduce": config.parallel.overlap_grad_reduce,
        "parallel.overlap_param_gather": config.parallel.overlap_param_gather,
    }
    for key, wanted in overlaps.items():
        if wanted and resources.is_cpu(config.device):
            yield f"{key}: overlaps CUDA streams; use false on a CPU"


def _alignment(config: Config, resources: Resources) -> Iterator[str]:
    """Yields strides of the grouped expert matrices that the training dtype does not allow."""
    model, shards = config.model, config.parallel.expert_tensor
    if model.num_experts < 1 or shards < 1:
        return
    dtype, size = ("bf16", 2) if resources.is_bf16(config.device) else ("fp32", 4)
    step = _GROUPED_MM_ALIGNMENT // size
    if not is_multiple(model.hidden_size, step):
        yield (
            f"model.hidden_size: {model.hidden_size} is not a multiple of {step}, which grouped "
            f"expert matrices in {dtype} need; use {near_multiples(model.hidden_size, step)}"
        )
    gate, rank = GATES[model.gate], model.gate_size.rank
    if gate.ranked and is_multiple(rank, shards) and not is_multiple(rank, step * shards):
        yield (
            f"model.gate_rank: {rank} / parallel.expert_tensor={shards} is not a multiple of "
            f"{step}, which grouped expert matrices in {dtype} need; use "
            f"{near_multiples(rank, step * shards)}"
        )
    width = model.expert_ffn_hidden_size
    if is_multiple(width, shards) and not is_multiple(width, step * shards):
        yield (
            f"model.expert_ffn_hidden_size: {width} / parallel.expert_tensor={shards} is not a "
            f"multiple of {step}, which grouped expert matrices in {dtype} need; "
            f"use {near_multiples(width, step * shards)}"
        )
