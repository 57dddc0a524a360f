"""Checks the model's sizes and the number of processes against the parallel sizes."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.layout import (
    expert_parallel_size,
    model_parallel_size,
    smallest_world_size,
)
from mone_megatron.config.parallel import ParallelConfig
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.wording import is_multiple, near_divisors, near_multiples
from mone_megatron.methods.gates import GATES


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields sizes that the parallel sizes do not divide."""
    yield from _widths(config)
    yield from _product_key(config)
    yield from _stages(config)
    yield from _sequence(config)
    yield from _world(config.parallel, resources.world_size)


def _widths(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor
    split = [
        ("model.num_attention_heads", model.num_attention_heads, "parallel.tensor", tensor),
        ("model.num_query_groups", model.num_query_groups, "parallel.tensor", tensor),
        ("model.vocab_padding_multiple", model.vocab_padding_multiple, "parallel.tensor", tensor),
        ("model.shared_expert_ffn_hidden_size", model.shared_expert_ffn_hidden_size,
         "parallel.tensor", tensor),
    ]  # fmt: skip
    if model.dense_layers > 0 and model.experts != "product_key":
        width = model.dense_ffn_hidden_size
        split.append(("model.dense_ffn_hidden_size", width, "parallel.tensor", tensor))
    if model.num_experts > 0:
        split.append(("model.num_experts", model.num_experts, "parallel.expert", parallel.expert))
        split.append(
            ("model.expert_ffn_hidden_size", model.expert_ffn_hidden_size,
             "parallel.expert_tensor", parallel.expert_tensor)
        )  # fmt: skip
        split += [
            ("model.gate_rank", weight.shape[-2], "parallel.expert_tensor", parallel.expert_tensor)
            for weight in GATES[model.gate].weights(model.gate_size).values()
            if weight.shape[-2] != model.expert_ffn_hidden_size
        ]
    for key, size, by, ways in split:
        if not is_multiple(size, ways):
            yield (
                f"{by}: {ways} does not divide {key}={size}; use {by}={near_divisors(size, ways)}"
                f", or {key}={near_multiples(size, ways)}"
            )
    if model.num_experts == 0:
        for name, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
            if size > 1:
                yield f"parallel.{name}: {size} splits experts and model.num_experts=0; use 1"


def _product_key(config: Config) -> Iterator[str]:
    tensor = config.parallel.tensor
    if config.model.experts == "product_key" and tensor > 1:
        yield (
            f"parallel.tensor: {tensor} splits MLPs, and every rank has all experts of "
            "model.experts=product_key; use parallel.tensor=1, and parallel.pipeline or data "
            "parallelism"
        )


def _stages(config: Config) -> Iterator[str]:
    layers = config.model.num_layers
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    if not is_multiple(layers, stages):
        yield (
            f"parallel.pipeline: model.num_layers={layers} is not a multiple of "
            f"parallel.pipeline*virtual_pipeline={stages}; use model.num_layers="
            f"{near_multiples(layers, stages)}, or stages that divide "
            f"{layers} ({near_divisors(layers, stages)})"
        )


def _sequence(config: Config) -> Iterator[str]:
    parallel, length = config.parallel, config.train.seq_length
    # Context parallelism gives each rank two pieces of the sequence, to balance the causal mask.
    pieces = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if not is_multiple(length, pieces):
        made_of = "parallel.tensor*2*context" if parallel.context > 1 else "parallel.tensor"
        yield (
            f"train.seq_length: {length} is not a multiple of {made_of}={pieces}; "
            f"use {near_multiples(length, pieces)}"
        )


def _world(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    model_size, expert_size = model_parallel_size(parallel), expert_parallel_size(parallel)
    if model_size < 1 or expert_size < 1:
        return
    smallest = smallest_world_size(parallel)
    fix = f"run {near_multiples(world_size, smallest)} processes, or change the sizes"
    for names, size in (
        (("tensor", "pipeline", "context"), model_size),
        (("expert", "expert_tensor", "pipeline"), expert_size),
    ):
        if not is_multiple(world_size, size):
            yield (
                f"parallel.{_largest(parallel, *names)}: world size {world_size} is not a multiple "
                f"of parallel.{'*'.join(names)}={size}; {fix}"
            )


def _largest(parallel: ParallelConfig, *names: str) -> str:
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "expert_tensor": parallel.expert_tensor,
    }
    return max(names, key=lambda name: sizes[name])
