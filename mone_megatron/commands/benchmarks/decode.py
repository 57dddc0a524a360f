"""Times a decoding step of the experts: rows of kept neurons beside all rows."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_place(parser)
    arguments.add_sizes(parser)
    parser.add_argument(
        "--batch", type=arguments.positive, nargs="+", default=[1, 4, 16], help="tokens"
    )
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[0.125, 0.25])
    parser.add_argument(
        "--repeats", type=arguments.positive, default=15, help="of each (default 15)"
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots

    require("hf", "transformers")
    shape = arguments.shape_of(options, tokens=1)
    device, hardware = ranks.use_device(options.device, options.threads)
    from mone_megatron.lab.benchmarks.decode import measure_decode

    result = measure_decode(
        shape,
        options.batch,
        options.keep_ratio,
        repeats=options.repeats,
        device=device,
        dtype=arguments.dtype_of(options),
    )
    return Outcome(
        hardware,
        result_files.decode_lines(result),
        result,
        lambda: result_plots.decode_figure(result),
    )


BENCHMARK = Benchmark(
    name="decode",
    help="decoding a layer",
    description="one decoding step of the experts: rows of kept neurons beside all rows",
    examples=("decode --batch 1 4 16 --keep-ratio 0.125 0.25 --experts 64",),
    add_options=_add_options,
    measure=_measure,
)
