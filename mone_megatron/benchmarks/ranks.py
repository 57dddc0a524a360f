"""Start the ranks of a benchmark: gloo processes on this machine.

Imports no megatron-core at module level: that must follow ``install_cpu_backend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config, DeviceConfig
from mone_megatron.config.validate import validate
from mone_megatron.data.prepare import prepare_data
from mone_megatron.parallel.device import open_device
from mone_megatron.parallel.world import World

if TYPE_CHECKING:
    from mone_megatron.benchmarks.cost import Cost
    from mone_megatron.benchmarks.save import SaveCost
    from mone_megatron.benchmarks.spine import SpineCost

_TIMEOUT_SECONDS = 3600.0


def prepare(overrides: Sequence[str], processes: int) -> Config:
    """Check the configuration for ``processes`` CPU ranks and make its data, before any start.

    Raises:
        ValueError: for a configuration or data that cannot work.
    """
    config = compose([*overrides, "device.kind=cpu"])
    validate(config, world_size=processes, num_devices=0, local_world_size=processes)
    prepare_data(config)
    return config


def use_threads(threads: int) -> str:
    """Compute in this process on ``threads`` CPU threads (0: one a core); tells the hardware."""
    return open_device(DeviceConfig(kind="cpu", threads=threads), World()).hardware


def use_gpu() -> str:
    """Compute in this process on its GPU; tells the hardware.

    Raises:
        ValueError: without one.
    """
    return open_device(DeviceConfig(kind="cuda"), World()).hardware


def run_spine(config: Config, processes: int, *, repeats: int, steps: int) -> SpineCost:
    """:func:`mone_megatron.benchmarks.spine.measure_spine` on ``processes`` ranks; rank 0's."""
    open_device(config.device, World())
    from mone_megatron.benchmarks.spine import measure_spine
    from mone_megatron.testing.processes import Processes

    with Processes(processes, timeout_seconds=_TIMEOUT_SECONDS) as ranks:
        return ranks.run(measure_spine, config, repeats=repeats, steps=steps)[0]


def run_save(config: Config, processes: int, *, repeats: int) -> SaveCost:
    """:func:`mone_megatron.benchmarks.save.measure_save` on ``processes`` ranks; rank 0's."""
    open_device(config.device, World())
    from mone_megatron.benchmarks.save import measure_save
    from mone_megatron.testing.processes import Processes

    with Processes(processes, timeout_seconds=_TIMEOUT_SECONDS) as ranks:
        return ranks.run(measure_save, config, repeats=repeats)[0]


def run_cost(moe: Config, mone: Config, processes: int, *, repeats: int, part_repeats: int) -> Cost:
    """:func:`mone_megatron.benchmarks.cost.measure_cost` on ``processes`` ranks; rank 0's."""
    open_device(moe.device, World())
    from mone_megatron.benchmarks.cost import measure_cost
    from mone_megatron.testing.processes import Processes

    with Processes(processes, timeout_seconds=_TIMEOUT_SECONDS) as ranks:
        return ranks.run(measure_cost, moe, mone, repeats=repeats, part_repeats=part_repeats)[0]
