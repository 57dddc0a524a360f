"""Times the exact top-k mask beside torch.topk and torch.kthvalue."""

from __future__ import annotations

import argparse

from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_place(parser)
    parser.add_argument("--rows", type=arguments.positive, nargs="+", default=[64, 512, 4096])
    parser.add_argument(
        "--neurons", type=arguments.positive, nargs="+", default=[64, 256, 1024, 4096]
    )
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument(
        "--repeats", type=arguments.positive, default=15, help="of each (default 15)"
    )


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.select import measure_select

    device, hardware = ranks.use_device(options.device, options.threads)
    cells = measure_select(
        options.rows,
        options.neurons,
        options.keep_ratio,
        repeats=options.repeats,
        device=device,
        dtype=arguments.dtype_of(options),
    )
    return Outcome(
        hardware, result_files.select_lines(cells), cells, lambda: result_plots.select_figure(cells)
    )


BENCHMARK = Benchmark(
    name="select",
    help="the top-k mask",
    description="the exact top-k mask against torch.topk + scatter and torch.kthvalue",
    examples=("select --rows 2048 --neurons 256 1024",),
    add_options=_add_options,
    measure=_measure,
)
