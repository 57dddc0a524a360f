"""What the ranks of a real tiny run hold, to compare with the plan; run in spawned processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from mone_megatron.parallel.device import Device
from mone_megatron.planning.shards import StateBytes
from mone_megatron.testing import trainer as testing
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches
from mone_megatron.train.checkpoint_state import EXP_AVG, EXP_AVG_SQ, MASTER, parameter_states
from mone_megatron.train.step import _forward_step


def build(overrides: Sequence[str], dtype: torch.dtype) -> Trainer:
    """A trainer in fp32, which the test trainer builds, or in bf16."""

    def device(kind: str, place: torch.device, _: torch.dtype, threads: int, name: str) -> Device:
        return Device(kind, place, dtype, threads, name)

    with patch.object(testing, "Device", device):
        return build_trainer(overrides, data_fingerprint="random tokens")


def state_bytes(overrides: Sequence[str], *, bf16: bool) -> tuple[StateBytes, int]:
    """The bytes of this rank's real tensors after one step, and its number of parameters."""
    trainer = build(overrides, torch.bfloat16 if bf16 else torch.float32)
    trainer.stepper.train(random_batches(trainer))
    weights = gradients = parameters = 0
    for chunk in trainer.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            gradients += buffer.grad_data.nbytes
            weights += 0 if buffer.param_data is None else buffer.param_data.nbytes
        parameters += sum(weight.numel() for weight in chunk.parameters())
        if not trainer.config.parallel.distributed_optimizer:
            weights += sum(weight.nbytes for weight in chunk.parameters())
    sizes = {MASTER: 0, EXP_AVG: 0, EXP_AVG_SQ: 0}
    for state in parameter_states(trainer.state.optimizer):
        if state.main is None or state.inner is None:
            continue
        assert {EXP_AVG, EXP_AVG_SQ} <= state.inner.state[state.main].keys()
        for kind in state.kinds:
            tensor = state.tensor(kind)
            assert tensor is not None
            sizes[kind] += tensor.nbytes
    moments = sizes[EXP_AVG] + sizes[EXP_AVG_SQ]
    return StateBytes(weights, gradients, sizes[MASTER], moments), parameters


def saved_bytes(overrides: Sequence[str], *, bf16: bool) -> int:
    """Bytes of the distinct storages that one forward pass saves for backward on this rank.

    Weights are not activations and are left out.
    """
    trainer = build(overrides, torch.bfloat16 if bf16 else torch.float32)
    # Addresses name storages only as long as these live: all tensors saved are kept.
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    batches = random_batches(trainer)
    (chunk,) = trainer.chunks
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _forward_step(iter(batches), chunk)
    weights = {tensor.untyped_storage().data_ptr() for tensor in _weights(chunk)}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept
    }
    return sum(size for address, size in storages.items() if address not in weights)


def _weights(chunk: DistributedDataParallel) -> Iterator[Tensor]:
    for parameter in chunk.module.parameters():
        yield parameter
        yield parameter.main_grad  # type: ignore[attr-defined]
    yield from chunk.module.buffers()


def most_passes_in_flight(overrides: Sequence[str]) -> int:
    """How many forward passes wait for their backward pass at once on this rank, in a real step."""
    trainer = build(overrides, torch.float32)
    waiting = most = 0

    def backward(_: Tensor) -> None:
        nonlocal waiting
        waiting -= 1

    def forward(_: torch.nn.Module, __: object, output: Tensor) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        output.register_hook(backward)

    for chunk in trainer.chunks:
        chunk.module.register_forward_hook(forward)
    trainer.stepper.train(random_batches(trainer))
    assert waiting == 0
    return most
