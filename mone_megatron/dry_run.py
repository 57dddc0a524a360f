"""Tells what a run would be, checked up to the point where its model would be built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mone_megatron.config.layout import Layout
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.config.without_effect import without_effect
from mone_megatron.counting import counted
from mone_megatron.data.prepare import PreparedData, check_cache, prepare_data
from mone_megatron.ownership import live_owner
from mone_megatron.parallel.world import World
from mone_megatron.train.run_directory import check_run_directory


def dry_run(
    config: Config, world: World, processes: int, written: Mapping[str, str] | None = None
) -> list[str]:
    """Checks configuration, layout, data and ``run.dir`` of a run, and trains nothing.

    A corpus that its source makes (``data.source=stdlib``) is made, as the run would.

    Args:
        config: the configuration of the run.
        world: the place of this process, which need not be one of the run's.
        processes: the number of processes of the run.
        written: key -> the value as it stands on the command line, for what is wrong with it.

    Returns:
        What the run would be, for people: a line for each of them.

    Raises:
        ValueError: what the run itself would refuse, naming key and fix.
    """
    known = processes == world.size
    layout = validate(
        config,
        world_size=processes,
        local_world_size=world.local_size if known else None,
        written=written,
    )
    folder = Path(config.run.dir)
    check_run_directory(folder)
    if world.rank == 0:
        check_cache(config.data)
    data = prepare_data(config)
    lines = {
        "run": config.run.name,
        "layout": _layout(config, layout),
        "data": _data(config, data),
        "schedule": _schedule(config),
        "run.dir": _folder(folder),
    }
    width = max(map(len, lines))
    return [
        *(f"{name:<{width}}  {line}" for name, line in lines.items()),
        *without_effect(config, written or {}),
        "all checked, nothing trained; without --dry-run it starts",
    ]


def _layout(config: Config, layout: Layout) -> str:
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "expert": parallel.expert,
        "data": layout.data,
    }
    parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    processes = counted(layout.world_size, "process")
    microbatches = layout.num_microbatches
    return (
        f"{processes}{f' ({parts})' if parts else ''}, {counted(microbatches, 'microbatch')} a step"
    )


def _data(config: Config, data: PreparedData) -> str:
    return f"{config.data.source}: {data.tokens:,} tokens, vocabulary of {data.vocab_size:,}"


def _schedule(config: Config) -> str:
    tokens = config.train.global_batch_size * config.train.seq_length
    steps = config.train.steps
    return f"{counted(steps, 'step')} of {tokens:,} tokens: {steps * tokens:,}"


def _folder(folder: Path) -> str:
    if owner := live_owner(folder):
        where = f"process {owner.process} on {owner.host}"
        return f"{folder}: in use by {where}; until that ends, the run would be refused"
    return f"{folder}: {'exists' if folder.exists() else 'new'}"
