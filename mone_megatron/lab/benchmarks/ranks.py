"""Starts the ranks of a benchmark: gloo processes on this machine, or takes part as one on GPUs.

Imports no megatron-core at module level: that must follow ``install_cpu_backend``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config, DeviceConfig
from mone_megatron.config.validate import validate
from mone_megatron.data.prepare import prepare_data
from mone_megatron.helpers import HelperError, unwinding_on_sigterm
from mone_megatron.methods.registry import imported
from mone_megatron.parallel.device import open_device, open_process_group
from mone_megatron.parallel.world import World

if TYPE_CHECKING:
    from mone_megatron.lab.benchmarks.cost import Cost
    from mone_megatron.lab.benchmarks.save import SaveCost
    from mone_megatron.lab.benchmarks.spine import SpineCost
    from mone_megatron.lab.benchmarks.ties import TieWay
    from mone_megatron.lab.benchmarks.ties_training import TrainingTies
    from mone_megatron.lab.benchmarks.train import TrainResult
    from mone_megatron.testing.processes import Processes

_TIMEOUT_SECONDS = 3600.0
# Of benchmarks that train several models to some end.
_LONG_TIMEOUT_SECONDS = 24 * 3600.0


def prepare(overrides: Sequence[str], processes: int, *, device: str = "cpu") -> Config:
    """Checks the configuration for ``processes`` ranks and makes its data, before any start.

    Raises:
        ValueError: for a configuration or data that cannot work.
    """
    config = checked(overrides, processes, device=device)
    prepare_data(config)
    return config


def checked(overrides: Sequence[str], processes: int, *, device: str = "cpu") -> Config:
    """Returns the configuration for ``processes`` ranks; its data is not made yet.

    Raises:
        ValueError: for a configuration that cannot work.
    """
    config = compose([*overrides, f"device.kind={device}"])
    devices = torch.cuda.device_count() if device == "cuda" else 0
    validate(config, world_size=processes, num_devices=devices, local_world_size=processes)
    return config


def vocabulary_of(config: Config) -> int:
    """Returns the tokenizer's number of entries, unpadded; the data is made already."""
    return prepare_data(config).vocab_size


def use_device(kind: Literal["cpu", "cuda"], threads: int) -> tuple[torch.device, str]:
    """Sets this process to compute on ``threads`` CPU threads (0: one a core), or on its GPU.

    Returns:
        The device, and the hardware in words.

    Raises:
        ValueError: for a GPU that is not there.
    """
    device = open_device(DeviceConfig(kind=kind, threads=threads), World())
    return device.torch_device, device.hardware


@contextmanager
def _ranks(count: int, timeout_seconds: float = _TIMEOUT_SECONDS) -> Iterator[Processes]:
    """Yields so many processes to measure in; they end with what is inside, on SIGTERM, too.

    Raises:
        HelperError: one of them cannot be started, fails or is killed, in one line.
    """
    from mone_megatron.testing.processes import Processes, RankFailedError

    processes = Processes(count, timeout_seconds=timeout_seconds, warm=False)
    with unwinding_on_sigterm(), processes as ranks:
        try:
            yield ranks
        except RankFailedError as error:
            lines = str(error).splitlines()
            why = lines[0] if len(lines) == 1 else f"{lines[0].split(': ')[0]}: {lines[-1]}"
            raise HelperError(why) from error


def _measured(name: str, processes: int, config: Config, *more: Config, **options: int) -> Any:
    """Runs a measurement on so many ranks, and returns rank 0's result.

    On CPUs the ranks are processes that end with the call. On GPUs this process is one of them,
    started by torchrun where there are several (not run here).

    Args:
        name: ``module:function`` of this package; it is imported once the device is open.
        processes: how many ranks.
        config: what it measures, with the device.
        more: further configurations of the same device.
        options: of the function.

    Raises:
        ValueError: on GPUs, for other than the started number of processes.
    """
    name = f"mone_megatron.lab.benchmarks.{name}"
    if config.device.kind == "cuda":
        world = World.from_environment()
        if world.size != processes:
            raise ValueError(
                f"--processes: {processes} on GPUs, and {world.size} were started; start it with "
                f"torchrun --nproc-per-node {processes}"
            )
        device = open_device(config.device, world)
        open_process_group(device, world, int(_TIMEOUT_SECONDS))
        measure = cast(Callable[..., Any], imported(name))
        result = measure(config, *more, **options)
        dist.destroy_process_group()
        return result
    open_device(config.device, World())
    measure = cast(Callable[..., Any], imported(name))
    with _ranks(processes) as ranks:
        return ranks.run(measure, config, *more, **options)[0]


def run_spine(config: Config, processes: int, *, repeats: int, steps: int) -> SpineCost:
    """Runs :func:`mone_megatron.lab.benchmarks.spine.measure_spine` on ``processes`` ranks.

    Returns rank 0's result.
    """
    found: SpineCost = _measured(
        "spine:measure_spine", processes, config, repeats=repeats, steps=steps
    )
    return found


def run_save(config: Config, processes: int, *, repeats: int) -> SaveCost:
    """Runs :func:`mone_megatron.lab.benchmarks.save.measure_save` on ``processes`` ranks.

    Returns rank 0's result.
    """
    found: SaveCost = _measured("save:measure_save", processes, config, repeats=repeats)
    return found


def run_cost(moe: Config, mone: Config, processes: int, *, repeats: int, part_repeats: int) -> Cost:
    """Runs :func:`mone_megatron.lab.benchmarks.cost.measure_cost` on ``processes`` ranks.

    Returns rank 0's result.
    """
    found: Cost = _measured(
        "cost:measure_cost", processes, moe, mone, repeats=repeats, part_repeats=part_repeats
    )
    return found


def run_ties(
    config: Config, *, ways: Sequence[TieWay], seeds: Sequence[int], steps: int, counted_steps: int
) -> TrainingTies:
    """Counts ties by :func:`mone_megatron.lab.benchmarks.ties_training.measure_training`.

    It trains with each ``train.seed``, in one process of its own, one seed after the other, and
    returns the models of all seeds.
    """
    open_device(config.device, World())
    from mone_megatron.lab.benchmarks.ties_training import measure_training

    with _ranks(1, _LONG_TIMEOUT_SECONDS) as ranks:
        found = [
            ranks.run(
                measure_training,
                replace(config, train=replace(config.train, seed=seed)),
                ways=ways,
                steps=steps,
                counted_steps=counted_steps,
            )[0]
            for seed in seeds
        ]
    return replace(found[0], trained=[model for result in found for model in result.trained])


def run_train(
    moe: Config, mone: Config, processes: int, *, repeats: int, steps: int
) -> TrainResult:
    """Runs :func:`mone_megatron.lab.benchmarks.train.measure_train` on ``processes`` ranks.

    Returns rank 0's result.
    """
    found: TrainResult = _measured(
        "train:measure_train", processes, moe, mone, repeats=repeats, steps=steps
    )
    return found
