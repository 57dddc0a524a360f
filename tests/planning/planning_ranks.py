"""What the ranks of a real tiny run hold, to compare with the plan; run in spawned processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mone_megatron.mone.neurons import NeuronGate
from mone_megatron.parallel.device import Device
from mone_megatron.planning.shards import StateBytes
from mone_megatron.testing import trainer as testing
from mone_megatron.testing.trainer import Trainer, build_trainer, random_batches
from mone_megatron.train.resume.saved_state import MASTER, parameter_states
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
    sizes = {MASTER: 0, "exp_avg": 0, "exp_avg_sq": 0}
    for state in parameter_states(trainer.state.optimizer):
        if state.main is None or state.inner is None:
            continue
        assert set(state.moments) <= state.inner.state[state.main].keys()
        # What is kept and not told would be lost on a resume, and is not counted.
        assert state.inner.state[state.main].keys() <= {*state.moments, "step"}
        for kind in state.kinds:
            tensor = state.tensor(kind)
            assert tensor is not None
            sizes[kind] += tensor.nbytes
    moments = sizes["exp_avg"] + sizes["exp_avg_sq"]
    return StateBytes(weights, gradients, sizes[MASTER], moments), parameters


def saved_bytes(overrides: Sequence[str], *, bf16: bool) -> int:
    """Bytes of the distinct storages that one forward pass saves for backward on this rank.

    It is that of a step that counts layers, which saves most: on CPUs the experts of other steps
    save their projections and activations only. Weights are not activations and are left out.
    """
    trainer = build(overrides, torch.bfloat16 if bf16 else torch.float32)
    # Addresses name storages only as long as these live: all tensors saved are kept.
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    # With context parallelism, this rank's part of each sequence.
    batches = [trainer.stepper._to_device(batch) for batch in random_batches(trainer)]
    (chunk,) = trainer.chunks
    for module in chunk.modules():
        if isinstance(module, NeuronGate):
            module.usage.collecting = True
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


class Sent(TorchDispatchMode):
    """Bytes that this rank sends in collectives of floating-point tensors, by kind of group.

    Rings as in :mod:`mone_megatron.planning.communication`; other tensors are counts of rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(
            dist.ProcessGroup.unbox(argument)
            for argument in args
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())  # type: ignore[attr-defined]
        )
        size = group.size()
        if size == 1:
            return
        if name == "_allgather_base_":
            operation, tensor, share = "all-gather", args[0], (size - 1) / size
        elif name == "_reduce_scatter_base_":
            operation, tensor, share = "reduce-scatter", args[1], (size - 1) / size
        elif name == "alltoall_base_":
            operation, tensor = "all-to-all", args[1]
            splits = args[4] or [1] * size
            share = 1 - splits[group.rank()] / max(sum(splits), 1)
        elif name == "allgather_into_tensor_coalesced_":
            (tensor,), operation, share = args[0], "all-gather", (size - 1) / size
        elif name == "reduce_scatter_tensor_coalesced_":
            (tensor,), operation, share = args[1], "reduce-scatter", (size - 1) / size
        elif name == "send":
            operation, tensor, share = "send", args[0][0], 1.0
        else:
            return
        if tensor.is_floating_point():
            key = f"{group.group_desc}: {operation}"
            self.bytes[key] = self.bytes.get(key, 0.0) + tensor.nbytes * share


def sent_in_a_step(overrides: Sequence[str]) -> dict[str, float]:
    """What this rank sends in one real step."""
    trainer = build(overrides, torch.float32)
    batches = random_batches(trainer)
    with Sent() as sent:
        trainer.stepper.train(batches)
    return sent.bytes
