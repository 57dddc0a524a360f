"""Benchmarks layers, selection, steps, peers, decoding, trainer, saves, as ratios in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status
from mone_megatron.commands.benchmarks import BENCHMARKS
from mone_megatron.display import harmless
from mone_megatron.ownership import owned_file


def _description() -> str:
    width = max(map(len, BENCHMARKS))
    return "\n".join(
        [
            "Measure ratios of things timed in turn (A B B A) in one run, after warm-up. Each is "
            "printed as:",
            "median (smallest..largest).",
            "",
            *(f"  {one.name:{width}}  {one.description}" for one in BENCHMARKS.values()),
        ]
    )


def _epilog() -> str:
    examples = [example for one in BENCHMARKS.values() for example in one.examples]
    return "\n".join(
        [
            "exit status: 0, or 2 for a configuration or data that cannot work",
            "",
            "examples:",
            *(f"  python tools/bench.py {example}" for example in examples),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_description(),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for benchmark in BENCHMARKS.values():
        command = commands.add_parser(benchmark.name, help=benchmark.help)
        command.add_argument(
            "--output",
            type=Path,
            metavar="FILE",
            help="also write the result as JSON, and a plot by it",
        )
        benchmark.add_options(command)
    return parser


def _run(options: argparse.Namespace) -> None:
    from mone_megatron.lab.benchmarks import result_files

    outcome = BENCHMARKS[options.command].measure(options)
    facts = result_files.environment(outcome.hardware)
    print("\n".join([*result_files.environment_lines(facts), *outcome.lines]))
    if options.output is not None:
        result_files.write_json(options.output, options.command, facts, outcome.result)
        print(f"wrote {options.output}")
        if outcome.draw is not None:
            from mone_megatron.lab.benchmarks import result_plots

            picture = options.output.with_suffix(".png")
            result_plots.write(outcome.draw(), picture)
            print(f"wrote {picture}")


def _owning(options: argparse.Namespace) -> None:
    with owned_file("--output", options.output):
        _run(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
