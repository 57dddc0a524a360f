"""Times the generation of texts by a whole model."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_place(parser)
    arguments.add_sizes(parser)
    parser.add_argument("--layers", type=arguments.positive, default=4, help="default 4")
    parser.add_argument("--new-tokens", type=arguments.positive, default=32, help="default 32")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="of each (default 5)")


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files

    require("hf", "transformers")
    shape = arguments.shape_of(options, tokens=1)
    device, hardware = ranks.use_device(options.device, options.threads)
    from mone_megatron.lab.benchmarks.generate import measure_generate

    result = measure_generate(
        shape,
        options.keep_ratio,
        layers=options.layers,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        device=device,
        dtype=arguments.dtype_of(options),
    )
    return Outcome(hardware, result_files.generate_lines(result), result)


BENCHMARK = Benchmark(
    name="generate",
    help="whole texts",
    description="texts of a whole model, the same",
    examples=("generate --layers 8 --neurons 768",),
    add_options=_add_options,
    measure=_measure,
)
