"""Tells what a run would be, checked up to the point where its model would be built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from mone_megatron.config.layout import Layout
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config
from mone_megatron.config.validate import validate
from mone_megatron.config.without_effect import without_effect
from mone_megatron.counting import counted
from mone_megatron.data.prepare import PreparedData, check_cache, prepare_data
from mone_megatron.large_imports import first_import_of
from mone_megatron.megatron_release import check_megatron_release
from mone_megatron.ownership import live_owner
from mone_megatron.parallel.world import World
from mone_megatron.train.named_checkpoints import check_named_checkpoints
from mone_megatron.train.run_directory import check_can_be_made, check_run_directory


def dry_run(
    config: Config,
    world: World,
    processes: int | None = None,
    written: Mapping[str, str] | None = None,
) -> list[str]:
    """Checks configuration, machine, layout, data, checkpoint and ``run.dir`` of a run.

    Nothing is trained and no device is opened. A corpus that its source makes
    (``data.source=stdlib``) is made, as the run would.

    Args:
        config: the configuration of the run.
        world: the place of this process, which need not be one of the run's.
        processes: the number of processes of a run elsewhere, of whose devices nothing is known;
            None for a run of the processes that there are, on this machine.
        written: key -> the value as it stands on the command line, for what is wrong with it.

    Returns:
        What the run would be, for people: a line for each of them.

    Raises:
        ValueError: what the run itself would refuse, naming key and fix.
    """
    here = processes is None
    size = world.size if processes is None else processes
    check = partial(
        validate,
        config,
        world_size=size,
        local_world_size=world.local_size if here else None,
        written=written,
    )
    # First without torch, whose import takes longer than all else before a refusal.
    layout = check()
    told = [f"WARNING: {untried}"] if (untried := check_megatron_release()) else []
    folder = Path(config.run.dir)
    check_can_be_made(folder)
    check_run_directory(folder)
    check_named_checkpoints(config)
    if world.rank == 0:
        check_cache(config.data)
    resources = Resources(size)
    if here:
        resources = replace(resources, num_devices=_count_devices())
        layout = check(num_devices=resources.num_devices)
    data = prepare_data(config)
    beginning = _beginning(config, resources, data, told.append)
    if resources.is_cpu(config.device) or here:
        _ask_megatron(config, resources, layout)
    lines = {
        "run": config.run.name,
        "device": _device(config, resources),
        "layout": _layout(config, layout),
        "data": _data(config, data),
        "schedule": _schedule(config),
        "checkpoint": beginning,
        "run.dir": _folder(folder),
    }
    width = max(map(len, lines))
    return [
        *(f"{name:<{width}}  {line}" for name, line in lines.items()),
        *told,
        *without_effect(config, written or {}),
        "all checked, nothing trained; without --dry-run it starts",
    ]


def _count_devices() -> int:
    with first_import_of("torch"):
        import torch
    return torch.cuda.device_count()


def _dtype(config: Config, resources: Resources) -> str | None:
    """Returns the dtype that the run would compute in; None where it depends on the devices."""
    by_device = config.device.dtype == "auto" and config.device.kind == "auto"
    if by_device and resources.num_devices is None:
        return None
    return "bf16" if resources.is_bf16(config.device) else "fp32"


def _beginning(
    config: Config, resources: Resources, data: PreparedData, say: Callable[[str], None]
) -> str:
    """Returns what the run would begin with."""
    with first_import_of("torch"):
        import torch

        from mone_megatron.train.resume.beforehand import first_state
        from mone_megatron.train.resume.identity import run_identity

    dtype = _dtype(config, resources)
    identity = run_identity(
        config,
        data_fingerprint=data.fingerprint,
        vocab_size=data.vocab_size,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
    )
    if dtype is None:
        del identity["dtype"]
    return first_state(config, identity, say)


def _ask_megatron(config: Config, resources: Resources, layout: Layout) -> None:
    """Lets megatron-core refuse its configuration of the model."""
    on_cpu = resources.is_cpu(config.device)
    with first_import_of("megatron.core"):
        import torch

        from mone_megatron.parallel.device import import_megatron_for

        import_megatron_for("cpu" if on_cpu else "cuda")
        # Only now: megatron-core binds names of torch.cuda at import.
        from mone_megatron.model.transformer import transformer_config

    transformer_config(
        config,
        dtype=torch.bfloat16 if resources.is_bf16(config.device) else torch.float32,
        on_cpu=on_cpu,
        sequence_parallel=layout.sequence_parallel,
    )


def _device(config: Config, resources: Resources) -> str:
    dtype = _dtype(config, resources)
    if resources.is_cpu(config.device):
        return f"CPU, {dtype}"
    if resources.num_devices is None:
        asked = config.device.kind if dtype is None else f"{config.device.kind}, {dtype}"
        return f"{asked}; of the machine that it runs on nothing was asked"
    return f"{counted(resources.num_devices, 'CUDA device')} here, {dtype}"


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
