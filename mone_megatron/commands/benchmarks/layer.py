"""Times the experts of a layer, forward and backward: MoNE in its modes beside MoE."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_place(parser)
    arguments.add_sizes(parser)
    parser.add_argument("--tokens", type=arguments.positive, default=1024, help="default 1024")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument(
        "--repeats", type=arguments.positive, default=15, help="of each (default 15)"
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.layer import measure_layer

    shape = arguments.shape_of(options, options.tokens)
    device, hardware = ranks.use_device(options.device, options.threads)
    result = measure_layer(
        shape,
        options.keep_ratio,
        repeats=options.repeats,
        device=device,
        dtype=arguments.dtype_of(options),
    )
    ratios = {cost.name: cost.over_moe for cost in result.costs}
    return Outcome(
        hardware,
        result_files.layer_lines(result),
        result,
        lambda: result_plots.bars("Experts, forward and backward", "time / MoE", ratios),
    )


BENCHMARK = Benchmark(
    name="layer",
    help="training a layer",
    description="experts forward and backward: MoNE in its modes and usual selections beside MoE",
    examples=(
        "layer --hidden 512 --neurons 256 --experts 8 --chosen 2 --tokens 1024",
        "layer --device cuda --dtype bf16 --tokens 32768 --output layer.json",
    ),
    add_options=_add_options,
    measure=_measure,
)
