"""Copies masters to the parameters they are masters of, and no parameter onto itself, on CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def _where_there_are_masters(original: Callable[..., None]) -> Callable[..., None]:
    """Returns the distributed optimizer's copy of masters to parameters, where it has any.

    Parameters in fp32 are their own masters: the library copies each onto itself.
    """

    @functools.wraps(original)
    def copy_main_params_to_model_params(optimizer: Any) -> None:
        if optimizer.is_stub_optimizer or any(optimizer.model_float16_groups):
            original(optimizer)

    return copy_main_params_to_model_params


def copy_no_parameter_onto_itself() -> None:
    """Leaves out copies of fp32 parameters onto themselves after a step, on CPU."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer._copy_main_params_to_model_params = _where_there_are_masters(
        DistributedOptimizer._copy_main_params_to_model_params
    )
