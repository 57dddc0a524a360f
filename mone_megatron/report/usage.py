"""Reads what the tokens of a trained run use, where its method does not fix it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mone_megatron.config.mone import metrics_of
from mone_megatron.config.schema import Config
from mone_megatron.planning.budget import (
    Usage,
    activated_of,
    active_are_measured,
    budget_of,
    experts_are_fixed,
    neurons_are_fixed,
)
from mone_megatron.report.runs import Run

# The share of a run, at its end, whose steps are averaged.
LAST_SHARE = 0.25


def usage_of(config: Config, run: Run) -> Usage:
    """Returns what the tokens of a run of ``config`` used over the last quarter of its steps.

    A run that did not count active neurons is one of an earlier version; all of them count then, as
    they did.

    Raises:
        ValueError: naming the run, when it has not recorded that.
    """
    density: dict[str, float] = {}
    active: dict[str, float] = {}
    experts = None
    for kind in config.mone.apply_to:
        if not neurons_are_fixed(config):
            density[kind] = _mean_of_last(run, f"{metrics_of(kind)}/density")
        share = f"{metrics_of(kind)}/active_share"
        if active_are_measured(config) and share in run.columns:
            active[kind] = _mean_of_last(run, share)
    if not experts_are_fixed(config):
        tokens = config.train.global_batch_size * config.train.seq_length
        per_expert = _mean_of_last(run, "router/tokens_per_expert_mean")
        experts = per_expert * config.model.num_experts / tokens
    return Usage(density, experts, active)


def _mean_of_last(run: Run, metric: str) -> float:
    if metric not in run.columns:
        raise ValueError(
            f"{run.path}: has no {metric}, which says what its tokens use; set "
            "logging.layer_interval"
        )
    column = run.columns[metric]
    last = column.values[column.steps > (1 - LAST_SHARE) * column.steps[-1]]
    return float(np.mean(last))


def measured(config: Config, vocab_size: int, run: Run) -> dict[str, Any]:
    """Returns what ``run.json`` has under ``measured``; nothing where all that is used is set.

    Args:
        config: of the run.
        vocab_size: the unpadded size of the vocabulary.
        run: as far as it has come.

    Raises:
        ValueError: naming the run, when it has not recorded what its tokens use.
    """
    usage = usage_of(config, run)
    if usage == Usage():
        return {}
    activated = activated_of(config, vocab_size, usage)
    budget = budget_of(config, vocab_size, usage)
    found: dict[str, Any] = {
        "parameters": {
            "activated_gate_counted": round(activated.gate_counted),
            "activated_neurons_only": round(activated.neurons_only),
            "activated_all_neurons": round(activated.all_neurons),
        },
        "flops_per_step": {"ideal": round(budget.step_flops)},
    }
    if usage.density:
        found["density"] = dict(usage.density)
    if usage.active:
        found["active_share"] = dict(usage.active)
    if usage.experts is not None:
        found["experts_per_token"] = usage.experts
    return found
