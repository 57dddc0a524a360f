"""Ranks the layouts of an experiment for a number of GPUs: those that fit first, then by time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Literal

from mone_megatron.config.errors import ConfigError
from mone_megatron.config.schema import Config, ParallelConfig
from mone_megatron.planning.plan import Machine, Plan, make_plan

_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_LARGEST_MICRO_BATCH = 16
# A layout is worth a change when it takes this share less of a step's time.
WORTH = 0.1
# A thousandth of a second each.
_LAYOUTS_AT_ONCE = 500


@dataclass(frozen=True)
class Found:
    """Holds a layout, what it takes to run it, and its plan (of the first and last stage only)."""

    overrides: tuple[str, ...]
    plan: Plan


def search(config: Config, machine: Machine) -> list[Found]:
    """Returns all layouts that are valid, the best first.

    Tensor (inside a node), pipeline (interleaved too), expert and expert-tensor parallelism, the
    size of a microbatch and recomputation are tried; of recomputation the least that fits. The
    batch, the model and the other keys stay.

    Raises:
        ConfigError: when no layout is valid, with what is wrong with data parallelism alone.
    """
    machine.check()
    found: list[Found] = []
    for parallel in _layouts(config, machine):
        for micro in _micro_batches(config):
            best = _least_recompute(config, machine, parallel, micro)
            if best is not None:
                found.append(best)
    if not found:
        make_plan(replace(config, parallel=_only_data(config.parallel)), machine)
        raise ConfigError(
            f"--search: no layout of {machine.gpus} GPUs suits train.global_batch_size="
            f"{config.train.global_batch_size}; change either"
        )
    return sorted(
        found, key=lambda item: (not item.plan.fits, item.plan.time.total, item.plan.worst.total)
    )


def faster_layout(plan: Plan) -> Found | None:
    """Returns the fastest layout that fits, where it is worth a change: by more than a tenth.

    Only the layout is changed: microbatches and recomputation, which :func:`search` tries as well,
    stay. Worlds with more layouts than a moment is enough for are not searched.
    """
    tried = list(islice(_layouts(plan.config, plan.machine), _LAYOUTS_AT_ONCE + 1))
    if len(tried) > _LAYOUTS_AT_ONCE:
        return None
    found: list[Found] = []
    for parallel in tried:
        candidate = replace(plan.config, parallel=parallel)
        with suppress(ConfigError):
            found.append(
                Found(_overrides(candidate), make_plan(candidate, plan.machine, rough=True))
            )
    fitting = [item for item in found if item.plan.fits and speed_up(item.plan, plan) > WORTH]
    return min(fitting, key=lambda item: item.plan.time.total, default=None)


def speed_up(plan: Plan, over: Plan) -> float:
    """Returns by which share of its time a step of one plan is faster than one of another."""
    return 1 - plan.time.total / over.time.total


def _only_data(parallel: ParallelConfig) -> ParallelConfig:
    return replace(parallel, tensor=1, pipeline=1, virtual_pipeline=1, expert=1, expert_tensor=1)


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _layouts(config: Config, machine: Machine) -> Iterator[ParallelConfig]:
    model, gpus = config.model, machine.gpus
    node = min(gpus, machine.gpus_per_node)
    tensors = [size for size in _divisors(model.num_attention_heads, node) if gpus % size == 0]
    pipelines = _divisors(model.num_layers, gpus)
    experts = _divisors(model.num_experts, gpus) if model.num_experts else [1]
    for tensor, pipeline, expert in product(tensors, pipelines, experts):
        if gpus % (tensor * pipeline) or gpus % (expert * pipeline):
            continue
        inner = {1, tensor} if model.num_experts else {1}
        virtual = [1]
        if pipeline > 1:
            virtual += [
                chunks for chunks in (2, 3, 4) if model.num_layers // pipeline % chunks == 0
            ]
        for expert_tensor, chunks in product(sorted(inner), virtual):
            yield replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=chunks,
                expert=expert,
                expert_tensor=expert_tensor,
            )


def _micro_batches(config: Config) -> list[int]:
    sizes = {config.train.micro_batch_size}
    size = 1
    while size <= min(_LARGEST_MICRO_BATCH, config.train.global_batch_size):
        sizes.add(size)
        size *= 2
    return sorted(sizes)


def _least_recompute(
    config: Config, machine: Machine, parallel: ParallelConfig, micro: int
) -> Found | None:
    found: Found | None = None
    for recompute in _RECOMPUTE:
        train = replace(config.train, micro_batch_size=micro, recompute=recompute)
        candidate = replace(config, parallel=parallel, train=train)
        try:
            plan = make_plan(candidate, machine, rough=True)
        except ConfigError:
            return None
        found = Found(_overrides(candidate), plan)
        if plan.fits:
            return found
    return found


def _overrides(config: Config) -> tuple[str, ...]:
    """Returns what to write on a command line: every key that was searched."""
    parallel, train = config.parallel, config.train
    return (
        f"parallel.tensor={parallel.tensor}",
        f"parallel.pipeline={parallel.pipeline}",
        f"parallel.virtual_pipeline={parallel.virtual_pipeline}",
        f"parallel.expert={parallel.expert}",
        f"parallel.expert_tensor={parallel.expert_tensor}",
        f"train.micro_batch_size={train.micro_batch_size}",
        f"train.recompute={train.recompute}",
    )
