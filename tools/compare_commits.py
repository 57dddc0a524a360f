"""Prove that two versions of this repository compute the same, bitwise."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.display import harmless

_REPOSITORY = Path(__file__).resolve().parents[1]
_CACHE = Path(".cache", "compare_commits")

_DESCRIPTION = """\
Run two versions of this repository on this machine, each from a git worktree of its own, and
compare what they compute to the last bit: losses, gradient norms and all other metrics but times,
parameters and optimizer moments, checkpoints, exports and their logits, kept neurons. HEAD also
goes on from BASE's checkpoint, exports BASE's run and reads it with its tools.

Everything goes through command lines and files, in fp32 on the CPU, one thread a process; the data
are the source of the Python standard library. What HEAD adds (a metric, a key) is told and is no
difference; what it lacks is one. Code and prose of exports are not compared."""

_EPILOG = """\
exit status: 0 equal, 1 different or not compared, 2 what cannot be done, 130 interrupted

Processor time of one version: about 70 s for --quick, 12 minutes for the whole; BASE takes as much
again unless it is in the cache.

examples:
  python tools/compare_commits.py main --quick
  python tools/compare_commits.py main
  python tools/compare_commits.py v0.1 v0.2 --output comparison.json
  python tools/compare_commits.py main --only one_process export"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="git revision that is right by definition")
    parser.add_argument(
        "head", nargs="?", metavar="HEAD", help="git revision (default: the working tree as it is)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick",
        action="store_true",
        help="tiny_moe and tiny_mone on 1 and 2 processes, export and resume only",
    )
    which.add_argument("--only", nargs="+", default=[], metavar="NAME", help="measurements to make")
    parser.add_argument(
        "--cache",
        type=Path,
        default=_REPOSITORY / _CACHE,
        metavar="DIR",
        help=f"what BASE computed is kept here, by commit and machine ({_CACHE})",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    outcome: list[bool] = []

    def run(options: argparse.Namespace) -> None:
        # Only now: they take seconds to import.
        from mone_megatron.testing.commit_comparison.comparison import choose, compare_commits
        from mone_megatron.testing.commit_comparison.differences import summary, table

        if options.output is not None and not options.output.resolve().parent.is_dir():
            raise ValueError(f"--output: {options.output.resolve().parent} is no folder; make it")
        compared = compare_commits(
            options.base,
            options.head,
            repository=_REPOSITORY,
            chosen=choose(quick=options.quick, only=options.only),
            cache=options.cache,
            say=say,
        )
        print(table(compared.outcomes))
        print()
        print(f"BASE {compared.base.describe()}")
        print(f"HEAD {compared.head.describe()}")
        print(f"{summary(compared.outcomes)}; {compared.seconds:.0f} s")
        if options.output is not None:
            text = json.dumps(compared.as_json(), indent=1) + "\n"
            options.output.write_text(text, encoding="utf-8")
            print(f"wrote {options.output}")
        outcome.append(compared.equal)

    return exit_status(run, options) or (0 if outcome[0] else 1)


if __name__ == "__main__":
    sys.exit(main())
