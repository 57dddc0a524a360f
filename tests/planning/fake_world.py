"""One rank of a large run, built on meta tensors in a fake process group, against its plan.

python tests/planning/fake_world.py RANK WORLD_SIZE key=value ...

A process of its own: it replaces torch's device for all that follows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mone_megatron.parallel.megatron_compat.cpu_backend import install_cpu_backend


class OnMeta(TorchFunctionMode):
    """Whatever device a tensor is made on, it is meta."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        result = function(*args, **kwargs)
        # megatron-core asks for the kind of a tensor by name.
        return result.replace("torch.meta.", "torch.") if isinstance(result, str) else result


def _of_this_rank(gathered: list[object], own: object, group: object = None) -> None:
    """``all_gather_object`` where nobody answers: everyone says what this rank does."""
    gathered[:] = [own] * len(gathered)


def check(rank: int, world_size: int, overrides: Sequence[str]) -> str:
    """Build the rank's part of the model and the optimizer; one line of what was equal.

    Raises:
        AssertionError: when something differs from the plan.
    """
    install_cpu_backend()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    from megatron.core import parallel_state

    from mone_megatron.config.load import compose
    from mone_megatron.config.validate import validate
    from mone_megatron.model import builder
    from mone_megatron.parallel.device import Device
    from mone_megatron.parallel.groups import open_expert_sources, open_groups
    from mone_megatron.planning.layout import place_of
    from mone_megatron.planning.plan import vocabulary_of
    from mone_megatron.planning.shards import StateBytes, stage_state
    from mone_megatron.train.optimizer import build_optimizer
    from mone_megatron.train.resume.saved_state import MASTER, parameter_states

    config = compose(overrides)
    layout = validate(config, world_size=world_size, num_devices=8, local_world_size=8)
    open_groups(config.parallel, config.train, timeout_seconds=300)
    place = place_of(rank, config.parallel, layout)
    assert (
        place.tensor,
        place.context,
        place.data,
        place.pipeline,
        place.expert,
        place.expert_tensor,
        place.expert_data,
    ) == (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_data_parallel_rank(),
    )
    assert parallel_state.get_expert_data_parallel_world_size() == layout.expert_data
    sources = open_expert_sources(config.parallel)
    device = Device("cpu", torch.device("meta"), torch.bfloat16, 1, "")
    vocab_size = vocabulary_of(config)
    with (
        torch.device("meta"),
        OnMeta(),
        # Meta tensors cannot be filled.
        patch.object(builder, "initialize_weights"),
        patch.object(dist, "all_gather_object", _of_this_rank),
    ):
        chunks = builder.build_model(
            config,
            device=device,
            vocab_size=vocab_size,
            sequence_parallel=layout.sequence_parallel,
            sources=sources,
        )
        optimizer = build_optimizer(config, device, chunks)
    buffers = [
        buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    sizes = {MASTER: 0, "exp_avg": 0}
    for state in parameter_states(optimizer):
        if state.main is not None:
            first, last = state.span
            sizes[MASTER] += 4 * state.main.numel()
            sizes["exp_avg"] += 4 * (last - first)
    real = StateBytes(
        weights=sum(buffer.param_data.nbytes for buffer in buffers),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        masters=sizes[MASTER],
        moments=2 * sizes["exp_avg"],
    )
    stage = stage_state(config, layout, vocab_size, place.pipeline, weight_bytes=2)
    assert stage.of(place, config.parallel.context) == real, (stage.of(place, 1), real)
    buckets = sum(len(buffer.buckets) for buffer in buffers)
    assert buckets == sum(buffer.buckets for buffer in (*stage.dense, *stage.experts)), buckets
    return f"rank {rank} of {world_size} ({place}): {real} in {buckets} buckets"


if __name__ == "__main__":
    print(check(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
