"""Times training steps of MoE and MoNE beside transformers' and their matrix products."""

from __future__ import annotations

import argparse
from typing import Any

from mone_megatron.command_line import say
from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_pair(parser)
    arguments.add_overrides(parser)
    arguments.add_device(parser)
    parser.add_argument("--repeats", type=arguments.positive, help="turns of each (default 10)")
    parser.add_argument(
        "--experts", type=arguments.positive, nargs="*", help="also with so many (default 16 32 64)"
    )
    parser.add_argument(
        "--micro-batch",
        type=arguments.positive,
        nargs="*",
        help="also with such microbatches (default 8)",
    )
    parser.add_argument(
        "--layers", type=arguments.positive, nargs="*", help="also so deep (default 8)"
    )
    parser.add_argument("--starts", type=arguments.not_negative, help="starts of each (default 2)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="other defaults: 32 experts beside the size as given, one start",
    )


# Defaults of `peers`, and those of `peers --quick`.
_DEFAULTS: dict[str, Any] = {
    "repeats": 10, "experts": [16, 32, 64], "micro_batch": [8], "layers": [8], "starts": 2,
}  # fmt: skip
_QUICK_DEFAULTS = _DEFAULTS | {"experts": [32], "micro_batch": [], "layers": [], "starts": 1}
# Turns at sizes that are no goal, such as more experts than these.
_FEW_TURNS = 4
_MOST_EXPERTS_OF_GOALS = 32


def _measure(options: argparse.Namespace) -> Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.peers.compare import Size, measure_peers

    require("hf", "transformers")
    for name, default in (_QUICK_DEFAULTS if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    # One process and thread, unless the overrides say otherwise.
    given = ["parallel=data", "device.threads=1", *options.overrides]

    def size(name: str, repeats: int, *more: str) -> Size:
        moe, mone = (
            ranks.prepare([f"experiment={experiment}", *given, *more], 1, device=options.device)
            for experiment in (options.moe, options.mone)
        )
        return Size(name, moe, mone, repeats)

    few = min(options.repeats, _FEW_TURNS)
    sizes = [size("", options.repeats)]
    for experts in options.experts:
        turns = options.repeats if experts <= _MOST_EXPERTS_OF_GOALS else few
        sizes.append(size(f"experts {experts}", turns, f"model.num_experts={experts}"))
    for sequences in options.micro_batch:
        key = f"train.micro_batch_size={sequences}"
        sizes.append(size(f"micro-batch {sequences}", few, key))
    for layers in options.layers:
        sizes.append(size(f"layers {layers}", few, f"model.num_layers={layers}"))
    _, hardware = ranks.use_device(options.device, sizes[0].moe.device.threads)
    result = measure_peers(
        sizes,
        vocab_size=ranks.vocabulary_of(sizes[0].moe),
        hardware=hardware,
        start_overrides={
            options.moe: [f"experiment={options.moe}", f"device.kind={options.device}", *given]
        },
        start_repeats=options.starts,
        say=say,
    )
    return Outcome(
        hardware,
        result_files.peers_lines(result),
        result,
        lambda: result_plots.peers_figure(result),
    )


BENCHMARK = Benchmark(
    name="peers",
    help="steps beside transformers'",
    description="training steps of MoE and MoNE beside transformers' and their matrix products",
    examples=("peers --quick --output peers.json",),
    add_options=_add_options,
    measure=_measure,
)
