"""Checks a first GPU: kernels, steps, speed, resuming, each in a process with a limit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.display import harmless
from mone_megatron.ownership import owned_path

_EPILOG = """\
Without a GPU it runs all that can be run, and says what is left.

exit status: 0; 1 when a check failed or ran out of its time; 2 for options that cannot work

examples:
  python tools/gpu_check.py --minutes 8 --output gpu_check
  python tools/gpu_check.py --only machine kernels --output gpu_check"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all checks (default 8)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gpu_check.json and .md, and runs"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks to run")
    return parser


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    bad: list[str] = []

    def check(options: argparse.Namespace) -> None:
        bad.extend(_run(options))

    return exit_status(check, options) or (1 if bad else 0)


def _run(options: argparse.Namespace) -> list[str]:
    """Returns the names of the checks that failed."""
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes: {options.minutes:g} is no time; use 8")
    import torch

    from mone_megatron.lab.gpu_check.checks import all_checks
    from mone_megatron.lab.gpu_check.runner import FAILED, LATE, LEFT, run_all

    gpu = torch.cuda.is_available()
    checks = all_checks(options.output, gpu=gpu)
    names = [check.name for check in checks]
    if unknown := [name for name in options.only if name not in names]:
        raise ValueError(f"--only: {unknown[0]}: no such check; use some of {', '.join(names)}")
    checks = [check for check in checks if not options.only or check.name in options.only]
    with owned_path("--output", options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        results = run_all(checks, options.output, minutes=options.minutes, gpu=gpu, say=say)
    if left := [result for result in results if result.status == LEFT]:
        print("left: " + "; ".join(f"{result.name} ({result.why})" for result in left))
    print(options.output / "gpu_check.md")
    return [result.name for result in results if result.status in (FAILED, LATE)]
