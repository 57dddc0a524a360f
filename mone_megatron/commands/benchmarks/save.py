"""Times how long a checkpoint stops training."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_steps(parser)
    arguments.add_device(parser)
    parser.add_argument("--experiment", default="quickstart_mone", help="default quickstart_mone")
    parser.add_argument(
        "--repeats", type=arguments.positive, default=10, help="of each (default 10)"
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    config = arguments.prepared(options, options.experiment)
    result = ranks.run_save(config, options.processes, repeats=options.repeats)
    return Outcome(result.hardware, result_files.save_lines(result), result)


BENCHMARK = Benchmark(
    name="save",
    help="checkpoints",
    description="how long a checkpoint stops training, async over sync",
    examples=("save --processes 2 parallel.expert=2",),
    add_options=_add_options,
    measure=_measure,
)
