"""Compares the trainer's tokens a second with a bare loop's."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_steps(parser)
    arguments.add_device(parser)
    parser.add_argument("--experiment", default="tiny_moe", help="default tiny_moe")
    parser.add_argument(
        "--repeats", type=arguments.positive, default=12, help="of each (default 12)"
    )
    parser.add_argument(
        "--steps", type=arguments.positive, default=20, help="a repeat (default 20)"
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    config = arguments.prepared(options, options.experiment)
    result = ranks.run_spine(
        config, options.processes, repeats=options.repeats, steps=options.steps
    )
    return Outcome(result.hardware, result_files.spine_lines(result), result)


BENCHMARK = Benchmark(
    name="spine",
    help="the trainer's overhead",
    description="tokens/s of the trainer over a bare loop on the same megatron-core objects",
    examples=("spine",),
    add_options=_add_options,
    measure=_measure,
)
