"""Compares training runs: a table on the terminal, comparison.png, comparison.html and .json."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, print_error
from mone_megatron.display import harmless
from mone_megatron.ownership import owned_folder
from mone_megatron.report.compare import compare
from mone_megatron.report.comparison_files import text_report, write_comparison
from mone_megatron.report.runs import load_run

_DESCRIPTION = """\
Compare any number of runs with the first one: final losses, speed and parameters as a table, loss
curves overlaid with their difference to the first run.

Runs are comparable when data, vocabulary, sequence length, global batch, tokens and seeds are the
same. Where they are not, the table stands under NOT COMPARABLE with every key that differs, and the
exit status is 1."""

_EPILOG = """\
exit status: 0 comparable (or --allow-mismatch), 1 not comparable, 2 unreadable input

examples:
  python tools/compare_runs.py runs/quickstart/moe runs/quickstart/mone --output runs/quickstart
  python tools/compare_runs.py runs/moe_s* runs/mone_s* --group-seeds --output runs/seeds"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR", help="run.dir of a run; the first is the reference"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for comparison.png, comparison.html and comparison.json",
    )
    parser.add_argument(
        "--page",
        default="comparison.html",
        metavar="NAME",
        help="file name of the HTML page in DIR (default: comparison.html)",
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="names to show, one a run (default: run.name)"
    )
    parser.add_argument(
        "--group-seeds",
        action="store_true",
        help="pool runs equal but for train.seed, run.name and run.dir: mean and 95%% t-interval",
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="exit 0 although the runs are not comparable; every output still says so",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    with owned_folder("--output", Path(options.output)):
        runs = [load_run(path) for path in options.runs]
        comparison = compare(runs, options.labels, group_seeds=options.group_seeds)
        print(text_report(comparison))
        paths = write_comparison(comparison, options.output, page_file=options.page)
    print()
    for path in paths:
        print(f"wrote {path}")
    if comparison.comparable or options.allow_mismatch:
        return 0
    print_error("the runs are NOT COMPARABLE (see above); --allow-mismatch accepts that")
    return 1


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_run, options)
