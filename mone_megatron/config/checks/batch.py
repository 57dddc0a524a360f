"""Checks the batch against the processes that share it."""

from __future__ import annotations

from collections.abc import Iterator

from mone_megatron.config.layout import model_parallel_size, smallest_world_size
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.wording import is_multiple, near_divisors, near_multiples
from mone_megatron.counting import counted


def check(config: Config, resources: Resources) -> Iterator[str]:
    """Yields a batch that the data-parallel ranks or the interleaved pipeline cannot share."""
    train, parallel, world_size = config.train, config.parallel, resources.world_size
    model_size = model_parallel_size(parallel)
    batch, micro = train.global_batch_size, train.micro_batch_size
    smallest = smallest_world_size(parallel)
    # Sizes below 1 are told by their groups, and processes that do not fit by the sharding.
    if min(model_size, smallest, batch, micro, world_size) < 1 or world_size % model_size:
        return
    data = world_size // model_size
    if batch % (micro * data):
        fixes = [f"train.global_batch_size={near_multiples(batch, micro * data)}"]
        if batch % data == 0:
            fixes.append(f"train.micro_batch_size={near_divisors(batch // data, micro)}")
        # The largest number of processes, at most those there are, that the batch can feed.
        for fewer in range(world_size - world_size % smallest, 0, -smallest):
            if batch % (micro * (fewer // model_size)) == 0:
                fixes.append(counted(fewer, "process"))
                break
        yield (
            f"train.global_batch_size: {batch} is not a multiple of train.micro_batch_size={micro} "
            f"* data-parallel size {data} ({counted(world_size, 'process')} / "
            f"parallel.tensor*pipeline*context={model_size}); use {', or '.join(fixes)}"
        )
        return
    microbatches = batch // (micro * data)
    # The interleaved schedule runs micro-batches in groups of the pipeline's size.
    if parallel.virtual_pipeline > 1 and not is_multiple(microbatches, parallel.pipeline):
        yield (
            f"parallel.virtual_pipeline: {microbatches} micro-batches a step are not a multiple of "
            f"parallel.pipeline={parallel.pipeline}; use train.global_batch_size="
            f"{near_multiples(batch, micro * data * parallel.pipeline)}, or "
            "parallel.virtual_pipeline=1"
        )
