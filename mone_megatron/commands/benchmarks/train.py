"""Times training steps of MoNE in its modes beside MoE."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_steps(parser)
    arguments.add_device(parser)
    arguments.add_pair(parser)
    parser.add_argument(
        "--repeats", type=arguments.positive, default=10, help="of each (default 10)"
    )
    parser.add_argument("--steps", type=arguments.positive, default=1, help="a repeat (default 1)")


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots

    moe, mone = (arguments.prepared(options, name) for name in (options.moe, options.mone))
    result = ranks.run_train(
        moe, mone, options.processes, repeats=options.repeats, steps=options.steps
    )
    ratios = {cost.name: cost.over_moe for cost in result.costs}
    return Outcome(
        result.hardware,
        result_files.train_lines(result),
        result,
        lambda: result_plots.bars(f"Training steps of {options.mone}", "step time / MoE", ratios),
    )


BENCHMARK = Benchmark(
    name="train",
    help="training steps",
    description="training steps of MoNE in its modes beside MoE",
    examples=("train --processes 2 parallel.expert=2",),
    add_options=_add_options,
    measure=_measure,
)
