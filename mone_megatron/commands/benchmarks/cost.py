"""Times what makes a step of MoNE dearer than one of MoE, part by part."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_steps(parser)
    arguments.add_device(parser)
    arguments.add_pair(parser)
    parser.add_argument(
        "--repeats", type=arguments.positive, default=20, help="steps of each (default 20)"
    )
    parser.add_argument(
        "--part-repeats",
        type=arguments.positive,
        default=60,
        help="measurements of each part (default 60)",
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    expert = f"parallel.expert={options.processes}"
    moe, mone = (arguments.prepared(options, name, expert) for name in (options.moe, options.mone))
    result = ranks.run_cost(
        moe,
        mone,
        options.processes,
        repeats=options.repeats,
        part_repeats=options.part_repeats,
    )
    return Outcome(result.hardware, result_files.cost_lines(result), result)


BENCHMARK = Benchmark(
    name="cost",
    help="MoNE's cost, by parts",
    description="step time of MoNE over MoE, and what each part of the difference takes",
    examples=("cost mone.keep_ratio=0.5 model.expert_ffn_hidden_size=512",),
    add_options=_add_options,
    measure=_measure,
)
