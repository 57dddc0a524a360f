"""Checks a whole configuration, before any device or process group is touched.

It is pure arithmetic over the configuration and what there is to run on. It repeats, with our key
names, the rules that megatron-core 0.16.1 would otherwise enforce with an assertion after minutes
of start-up, and adds those of the MoNE layer: bounds and the rules of one group stand in the file
of that group, what crosses groups in :mod:`mone_megatron.config.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mone_megatron.config.checks import CHECKS
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.group import problems
from mone_megatron.config.layout import Layout
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config


def validate(
    config: Config,
    *,
    world_size: int,
    num_devices: int | None = None,
    local_world_size: int | None = None,
    have_transformer_engine: bool | None = None,
    have_deep_ep: bool | None = None,
    written: Mapping[str, str] | None = None,
) -> Layout:
    """Returns the layout of a run of ``world_size`` processes, if ``config`` can run on them.

    Args:
        config: the whole configuration.
        world_size: the number of processes in all.
        num_devices: CUDA devices of this machine; None where unknown.
        local_world_size: processes on this machine; None where unknown.
        have_transformer_engine: whether Transformer Engine is there; None looks, without importing
            it.
        have_deep_ep: the same of DeepEP.
        written: dotted key -> the value as the user wrote it (``-1e-3``, which is read as -0.001),
            where that is known. A number that is wrong by itself is told in these words.

    Raises:
        ConfigError: every problem at once, each a line naming the key, the numbers and the fix.
    """
    resources = Resources(
        world_size=world_size,
        local_world_size=local_world_size,
        num_devices=num_devices,
        transformer_engine=have_transformer_engine,
        deep_ep=have_deep_ep,
    )
    found = list(problems(config, written or {}))
    for check in CHECKS:
        found.extend(check(config, resources))
    if found:
        raise ConfigError(found)
    return Layout.of(config, world_size)
