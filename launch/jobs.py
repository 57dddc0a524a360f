"""What launch/slurm.sh has to know of a command line: its runs, checked, as lines of bash.

Needs Hydra and no torch, so it runs where jobs are submitted from.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_megatron.command_line import USAGE_EXIT_CODE, Parser, print_error
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose, typed_values
from mone_megatron.config.schema import Config
from mone_megatron.config.sweep import (
    Combination,
    expand,
    file_name,
    folders_of_runs,
    spell_out_ablation,
)
from mone_megatron.config.validate import validate

# What conf/checkpoint/auto.yaml says.
_INTERVAL = "checkpoint.interval=500"
# SLURM reads % in file names, and #SBATCH lines have quotes and escapes of their own.
_UNFIT = re.compile(r"[%\"\\\n]")


@dataclass(frozen=True)
class Run:
    """One run of the job.

    Attributes:
        folder: its ``run.dir``, absolute: a job that is started again days later must find it.
        overrides: its whole command line.
    """

    folder: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        name: of the job.
        folder: where its own files go: the run's folder, or the one that holds a sweep's runs.
        runs: one, or one for each task of an array.
    """

    name: str
    folder: Path
    runs: tuple[Run, ...]


def _quoted(value: str) -> str:
    """``value`` as Hydra reads it back, whatever characters it has."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def _absolute(folder: str) -> Path:
    path = Path(os.path.abspath(folder))
    if _UNFIT.search(str(path)):
        raise ConfigError(
            f'run.dir: {str(path)!r} has one of % " \\, which SLURM takes for its own; '
            "choose another folder"
        )
    return path


def _keys(overrides: Sequence[str]) -> set[str]:
    return {text.split("=", 1)[0].lstrip("+") for text in overrides}


def _additions(config: Config, given: set[str], *, requeue: bool) -> list[str]:
    """What a run that is started again needs and nobody asked for."""
    added = []
    if config.checkpoint.interval == 0 and "checkpoint.interval" not in given:
        added.append(_INTERVAL)
    elif config.checkpoint.interval == 0 and requeue:
        raise ConfigError(
            "checkpoint.interval: 0, and a job that is started again needs checkpoints; leave it "
            "out, or submit with --no-requeue"
        )
    if config.checkpoint.resume == "never" and "checkpoint.resume" not in given:
        added.append("checkpoint.resume=auto")
    return added


def _check(overrides: Sequence[str], options: argparse.Namespace) -> None:
    """As the run will, but for packages, which may be on the nodes only."""
    validate(
        compose(overrides),
        world_size=options.nodes * options.tasks_per_node,
        num_devices=options.gpus_per_node,
        local_world_size=options.tasks_per_node,
        have_transformer_engine=True,
        have_deep_ep=True,
        written=typed_values(overrides),
    )


def plan(options: argparse.Namespace) -> Job:
    """The runs of a command line, each checked for the processes it will have.

    Raises:
        ConfigError: whatever would be refused when the job starts, and several values without
            ``--sweep``.
    """
    overrides = spell_out_ablation(options.overrides)
    combinations = expand(overrides)
    if not options.sweep and combinations[0].label:
        swept = [text for text in overrides if text not in combinations[0].overrides]
        keys = ", ".join(text.split("=", 1)[0] for text in swept)
        raise ConfigError(f"{keys}: several values need --sweep; add it, or give one value")
    if options.sweep and not combinations[0].label:
        raise ConfigError("--sweep: no key has several values; write key=a,b")
    given = _keys(overrides)
    configs = [compose(combination.overrides) for combination in combinations]
    name = file_name(options.job_name or configs[0].run.name)
    folders = [_absolute(config.run.dir) for config in configs]
    folder = folders[0]
    if options.sweep:
        folder, folders = folders_of_runs(
            combinations, folders, given="run.dir" in given, name=name
        )
        folder, folders = _absolute(str(folder)), [_absolute(str(path)) for path in folders]
    runs = []
    for combination, config, run_folder in zip(combinations, configs, folders, strict=True):
        command = [*combination.overrides]
        command += _additions(config, given, requeue=options.requeue)
        command += [f"run.dir={_quoted(str(run_folder))}"]
        if options.sweep:
            command += _names(combination, config, given, name)
        _check(command, options)
        runs.append(Run(run_folder, tuple(command)))
    return Job(name, folder, tuple(runs))


def _names(combination: Combination, config: Config, given: set[str], sweep: str) -> list[str]:
    """So that the runs of a sweep can be told apart, and found together in W&B."""
    added = []
    if "run.name" not in given:
        added.append(f"run.name={_quoted(f'{config.run.name}-{combination.label}')}")
    if not config.logging.wandb.group:
        added.append(f"logging.wandb.group={_quoted(sweep)}")
    return added


def to_bash(job: Job) -> str:
    """Variables for the submission and, by array task, for the job."""
    lines = [
        f"job_name={shlex.quote(job.name)}",
        f"job_dir={shlex.quote(str(job.folder))}",
        f"job_runs={len(job.runs)}",
        "case ${SLURM_ARRAY_TASK_ID:-0} in",
    ]
    for number, run in enumerate(job.runs):
        words = [f"        {shlex.quote(text)}" for text in run.overrides]
        lines += [
            f"{number})",
            f"    run_dir={shlex.quote(str(run.folder))}",
            "    overrides=(",
            *words,
            "    )",
            "    ;;",
        ]
    return "\n".join([*lines, "esac"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the job; problems are one line each."""
    parser = Parser(description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--tasks-per-node", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--job-name", default="")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("overrides", nargs="*")
    try:
        print(to_bash(plan(parser.parse_args(arguments))))
    except ValueError as error:
        print_error(str(error))
        return USAGE_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
