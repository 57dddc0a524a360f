"""Reads the points of a scaling study from folders of our own runs.

Legend: R rows (runs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mone_megatron.lab.scaling_law.table import Table, check_duplicates, check_positive
from mone_megatron.report.runs import Run, load_run

ParamsOf = Literal["activated", "neurons_only", "all_neurons", "total"]
LossOf = Literal["validation", "train"]
FlopsOf = Literal["ideal", "realised"]

_NOT_RECORDED = "not recorded"

# What must be equal for losses of models of different size and length to lie on one curve.
_CHECKS: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("data_fingerprint", lambda run: run.summary.data_fingerprint),
    ("vocab_size", lambda run: run.summary.vocab_size),
    ("train.seq_length", lambda run: run.setting("train.seq_length")),
)


def read_runs(
    paths: Sequence[str | Path],
    *,
    params_of: ParamsOf = "activated",
    loss_of: LossOf = "validation",
    flops_of: FlopsOf = "ideal",
    allow_duplicates: bool = False,
) -> Table:
    """Reads run folders as points.

    Args:
        paths: the ``run.dir`` of each run.
        params_of: N. ``activated``: the parameters a token uses, the gate counted in full (with
            embeddings); ``neurons_only``: the same with kept neurons only; ``all_neurons``: the
            same as if all neurons were kept; ``total``: all parameters.
        loss_of: the last validation loss, or the mean train loss over the last 5% of the steps.
        flops_of: operations a step that the method needs, or that dense products execute.
        allow_duplicates: runs of one point and one seed are replicates.

    Returns:
        The table; its keep ratio is ``mone.keep_ratio``, and 1 for a run without MoNE. Data,
        vocabulary or sequence length that differ, and runs that did not complete, are in
        ``mismatches``.

    Raises:
        ValueError: a folder is not a run, or lacks a figure; values that are not positive and
            finite; duplicates.
    """
    runs = [load_run(path) for path in paths]
    source = f"{len(runs)} runs" if len(runs) > 1 else str(runs[0].path)
    names = tuple(str(run.path) for run in runs)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{repeated[0]} is given twice: give each run once")
    values = {
        "params": np.array([_params(run, params_of) for run in runs], np.float64),
        "tokens": np.array([_tokens(run) for run in runs], np.float64),
        "loss": np.array([_loss(run, loss_of) for run in runs], np.float64),
        "flops": np.array([_flops(run, flops_of) for run in runs], np.float64),
        "keep ratio": np.array([_keep_ratio(run) for run in runs], np.float64),
    }
    check_positive(source, names, values)
    table = Table(
        source=source,
        names=names,
        params_R=values["params"],
        tokens_R=values["tokens"],
        loss_R=values["loss"],
        flops_R=values["flops"],
        ratio_R=values["keep ratio"],
        flops_rule=f"run.json, {flops_of}",
        mismatches=_mismatches(runs),
    )
    if not allow_duplicates:
        check_duplicates(table, [run.seed for run in runs])
    return table


def _params(run: Run, kind: ParamsOf) -> int:
    if kind == "total":
        return _count(run, "total")
    gate_counted = _count(run, "activated_gate_counted")
    if kind == "activated":
        return gate_counted
    neurons_only = _count(run, "activated_neurons_only")
    if kind == "neurons_only":
        return neurons_only
    if "activated_all_neurons" in run.parameters:
        return run.parameters["activated_all_neurons"]
    # An earlier version did not record it, and counted by the gate alone whatever the score was.
    # With h*f parameters in each of an MLP's three matrices, h*(f + 2K) count with the gate and
    # 3*h*K without, so 3 times the one less 2 times the other is 3*h*f, whatever K is; and what is
    # not selected counts 3 - 2 = 1 times.
    return 3 * gate_counted - 2 * neurons_only


def _count(run: Run, key: str) -> int:
    if key not in run.parameters:
        raise ValueError(f"{run.path}/run.json has no 'parameters.{key}': train the run again")
    return run.parameters[key]


def _tokens(run: Run) -> int:
    if run.tokens is None:
        raise ValueError(f"{run.path} records no 'tokens': train the run again")
    return run.tokens


def _loss(run: Run, kind: LossOf) -> float:
    if kind == "train":
        return run.final_train_loss
    if run.final_validation_loss is None:
        raise ValueError(f"{run.path} was never validated: give --run-loss train for all runs")
    return run.final_validation_loss


def _flops(run: Run, kind: FlopsOf) -> float:
    if kind not in run.flops_per_step:
        raise ValueError(f"{run.path}/run.json has no 'flops_per_step.{kind}': train the run again")
    return run.flops_per_step[kind] * run.last_step


def _keep_ratio(run: Run) -> float:
    if not run.setting("mone.enabled"):
        return 1.0
    ratio = run.setting("mone.keep_ratio")
    if not isinstance(ratio, int | float):
        raise ValueError(f"{run.path}/config.yaml has no 'mone.keep_ratio': restore the run's file")
    return float(ratio)


def _mismatches(runs: Sequence[Run]) -> tuple[str, ...]:
    found = []
    first = runs[0]
    for key, read in _CHECKS:
        expected = read(first)
        for other in runs[1:]:
            value = read(other)
            # What was not recorded cannot be said to be equal.
            if expected is None or value != expected:
                found.append(
                    f"{key}: {_shown(expected)} in {first.path}, {_shown(value)} in {other.path}"
                )
    found += [
        f"status: {run.path} is {run.summary.status}, not completed"
        for run in runs
        if run.summary.status != "completed"
    ]
    return tuple(found)


def _shown(value: Any) -> Any:
    return _NOT_RECORDED if value is None else value
