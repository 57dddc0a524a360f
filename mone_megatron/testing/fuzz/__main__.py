"""Runs the fuzzer from a command line: ``make fuzz ARGS='--seconds 600 --seed 7'``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random

from mone_megatron.command_line import Parser, exit_status
from mone_megatron.testing.fuzz.corpora import make_corpora
from mone_megatron.testing.fuzz.drawing import parse, refusals
from mone_megatron.testing.fuzz.fuzzing import CHECKS, Fuzzer, Report, fuzz
from mone_megatron.testing.fuzz.server import Server

_COMMAND = "python -m mone_megatron.testing.fuzz"
FAULTS_EXIT_CODE = 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_COMMAND,
        description="Trains random configurations that the checks accept and holds what must be so "
        "of each: what --dry-run accepts trains; a resumed run has the same bits; layouts agree; "
        "counts are right; exports compute the same; every tool reads it or says why not. A fault "
        "is shown with the command that repeats it, of as few settings as it takes.",
        epilog="exit status: 0 nothing found, 1 faults, 2 for what cannot be tried",
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to draw (120)")
    parser.add_argument("--seed", type=int, help="of the drawings (by the clock; it is shown)")
    parser.add_argument("--drawings", type=int, metavar="N", help="at most so many")
    parser.add_argument(
        "--checks",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="CHECK",
        help=f"of {', '.join(CHECKS)} (all)",
    )
    parser.add_argument(
        "--case", metavar="SETTINGS", help="try these instead of drawing, as a fault shows them"
    )
    parser.add_argument(
        "--later",
        type=Path,
        metavar="PYTHON",
        help="the interpreter of an environment with another megatron-core, to compare with",
    )
    parser.add_argument(
        "--corpora",
        type=Path,
        default=Path(".cache/fuzz"),
        metavar="DIR",
        help="keep what is trained on there (.cache/fuzz)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.seconds <= 0:
        raise ValueError(f"--seconds: {options.seconds:g} is not above 0")
    if options.later is not None and not options.later.exists():
        raise ValueError(f"--later: {options.later} is not there; name a python")
    corpora = make_corpora(options.corpora.resolve())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        server = stack.enter_context(Server(Path(sys.executable)))
        later = None
        if options.later is not None and "releases" in options.checks:
            # Not resolved: the interpreter of an environment is a link to another's.
            later = stack.enter_context(Server(options.later.absolute()))
        fuzzer = Fuzzer(server, corpora, folder, options.checks, later)
        if options.case is not None:
            return _try_case(fuzzer, options.case)
        seed = options.seed if options.seed is not None else time.time_ns() % 100_000
        print(f"seed {seed}, {options.seconds:g} s", flush=True)
        began = time.monotonic()
        report = fuzz(
            fuzzer,
            Random(seed),
            seconds=options.seconds,
            drawings=options.drawings,
            show=lambda text: print(text, flush=True),
            progress=Progress(began, options.seconds),
        )
    return _tell(fuzzer, report, time.monotonic() - began)


def _try_case(fuzzer: Fuzzer, words: str) -> int:
    drawing = parse(words)
    if drawing.data not in fuzzer.corpora:
        raise ValueError(f"--case: corpus={drawing.data} is none of {', '.join(fuzzer.corpora)}")
    if wrong := refusals(drawing, fuzzer.corpora, ranks=drawing.ranks):
        raise ValueError("\n".join(wrong))
    found = fuzzer.faults(drawing)
    for fault in found:
        print(f"{fault.check}: {fault.what}")
    print(f"made: {', '.join(fuzzer.made)}")
    return FAULTS_EXIT_CODE if found else 0


class Progress:
    """Says how far it is: over and over in one line of a terminal, else every ten seconds."""

    def __init__(self, began: float, seconds: float) -> None:
        self._began, self._seconds = began, seconds
        self._said = began
        self._terminal = sys.stderr.isatty()

    def __call__(self, report: Report) -> None:
        """Says it, if it is time to."""
        now = time.monotonic()
        if not self._terminal and now - self._said < 10:
            return
        self._said = now
        line = (
            f"{now - self._began:.0f} of {self._seconds:.0f} s: {report.drawings} configurations, "
            f"{len(report.found)} kinds of faults"
        )
        end = "\r" if self._terminal else "\n"
        print(f"\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def _tell(fuzzer: Fuzzer, report: Report, seconds: float) -> int:
    print(f"{report.drawings} configurations in {seconds:.0f} s; checks made:")
    for name, count in sorted(fuzzer.made.items()):
        print(f"  {name}: {count}")
    for kind, (drawing, fault) in report.found.items():
        more = f" (and of {report.again[kind]} more)" if report.again[kind] else ""
        print(f"\n{fault.check}: {fault.what}{more}")
        print(f"  {_COMMAND} --case '{drawing.words}'")
    return FAULTS_EXIT_CODE if report.found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    # Sums must not depend on how busy the machine is.
    os.environ["OMP_NUM_THREADS"] = "1"
    return exit_status(_run, _parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
