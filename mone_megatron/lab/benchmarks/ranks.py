"""Starts the ranks of a benchmark: gloo processes on this machine.

Imports no megatron-core at module level: that must follow ``install_cpu_backend``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config, DeviceConfig
from mone_megatron.config.validate import validate
from mone_megatron.data.prepare import prepare_data
from mone_megatron.helpers import HelperError, unwinding_on_sigterm
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
    config = compose([*overrides, f"device.kind={device}"])
    devices = torch.cuda.device_count() if device == "cuda" else 0
    validate(config, world_size=processes, num_devices=devices, local_world_size=processes)
    prepare_data(config)
    return config


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

    with unwinding_on_sigterm(), Processes(count, timeout_seconds=timeout_seconds) as ranks:
        try:
            yield ranks
        except RankFailedError as error:
            lines = str(error).splitlines()
            why = lines[0] if len(lines) == 1 else f"{lines[0].split(': ')[0]}: {lines[-1]}"
            raise HelperError(why) from error


def run_spine(config: Config, processes: int, *, repeats: int, steps: int) -> SpineCost:
    """Runs :func:`mone_megatron.lab.benchmarks.spine.measure_spine` on ``processes`` ranks.

    Returns rank 0's result.
    """
    open_device(config.device, World())
    from mone_megatron.lab.benchmarks.spine import measure_spine

    with _ranks(processes) as ranks:
        return ranks.run(measure_spine, config, repeats=repeats, steps=steps)[0]


def run_save(config: Config, processes: int, *, repeats: int) -> SaveCost:
    """Runs :func:`mone_megatron.lab.benchmarks.save.measure_save` on ``processes`` ranks.

    Returns rank 0's result.
    """
    open_device(config.device, World())
    from mone_megatron.lab.benchmarks.save import measure_save

    with _ranks(processes) as ranks:
        return ranks.run(measure_save, config, repeats=repeats)[0]


def run_cost(moe: Config, mone: Config, processes: int, *, repeats: int, part_repeats: int) -> Cost:
    """Runs :func:`mone_megatron.lab.benchmarks.cost.measure_cost` on ``processes`` ranks.

    Returns rank 0's result.
    """
    open_device(moe.device, World())
    from mone_megatron.lab.benchmarks.cost import measure_cost

    with _ranks(processes) as ranks:
        return ranks.run(measure_cost, moe, mone, repeats=repeats, part_repeats=part_repeats)[0]


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

    Returns rank 0's result. On GPUs this process is one of the ranks, started by torchrun when
    there are several (not run here).
    """
    if moe.device.kind == "cuda":
        world = World.from_environment()
        device = open_device(moe.device, world)
        open_process_group(device, world, int(_TIMEOUT_SECONDS))
        from mone_megatron.lab.benchmarks.train import measure_train

        result = measure_train(moe, mone, repeats=repeats, steps=steps)
        dist.destroy_process_group()
        return result
    open_device(moe.device, World())
    from mone_megatron.lab.benchmarks.train import measure_train

    with _ranks(processes) as ranks:
        return ranks.run(measure_train, moe, mone, repeats=repeats, steps=steps)[0]
