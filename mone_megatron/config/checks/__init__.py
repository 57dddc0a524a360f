"""Finds what is wrong between the groups of a configuration, by topic.

A check yields one line for each problem, ``key: what is wrong; fix``. It looks at values whose own
bounds are already told by their groups, so a value that is out of bounds must not make it fail.
"""

from collections.abc import Callable, Iterator

from mone_megatron.config.checks import (
    batch,
    cuda_graphs,
    data,
    density,
    dispatch,
    evaluation,
    hardware,
    megatron,
    neurons,
    optimizer,
    prediction,
    recovery,
    schedules,
    sharding,
)
from mone_megatron.config.resources import Resources
from mone_megatron.config.schema import Config

Check = Callable[[Config, Resources], Iterator[str]]

CHECKS: tuple[Check, ...] = (
    neurons.check,
    density.check,
    data.check,
    schedules.check,
    recovery.check,
    evaluation.check,
    sharding.check,
    prediction.check,
    batch.check,
    hardware.check,
    dispatch.check,
    megatron.check,
    cuda_graphs.check,
    optimizer.check,
)

__all__ = ["CHECKS", "Check"]
