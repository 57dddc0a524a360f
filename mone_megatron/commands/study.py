"""Trains variants over seeds, and says with intervals what differs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mone_megatron.command_line import Parser, exit_status, print_error, say
from mone_megatron.display import harmless
from mone_megatron.ownership import owned_folder

if TYPE_CHECKING:
    from mone_megatron.lab.studies.definition import Study

_DESCRIPTION = """\
Train every variant of a study with the same seeds, and compare the last validation losses seed by
seed: means, differences to the reference and 95% intervals (Student's t), as a table, a picture
and JSON, and all together on a page, studies.html. A study is a file, or the name of one of ours:
the paper's claims and other methods (--list). Runs that are there stay, those of another study with
the same settings are linked, and a study that was stopped goes on where it was. --report reads
what is trained so far, and says what is not, also while the study is being trained."""

_EPILOG = """\
exit status: 0 done, 1 a run failed, 2 for what cannot be done

examples:
  python tools/study.py --list
  python tools/study.py half_activated --jobs 2
  python tools/study.py scores --seeds 1 2 3 --set train.steps=100 --output runs/short
  python tools/study.py neurons --variants pooled mass --seeds 6 7 8
  python tools/study.py half_activated --report"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", nargs="*", metavar="STUDY", help="file, or name of a claim")
    parser.add_argument("--list", action="store_true", help="the studies there are, and exit")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default 1 2 3 4 5"
    )
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="only these and the reference (default all)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="overrides of all variants"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/studies"), help="default runs/studies"
    )
    parser.add_argument(
        "--report", action="store_true", help="read the runs that are there, and train none"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    from mone_megatron.lab.studies.definition import load_study, shipped_studies

    if options.list:
        for path in shipped_studies():
            study = load_study(path)
            print(f"{study.name:<20} {study.question} ({', '.join(study.variants)})")
        return
    _check(options)
    studies = _asked_for(options)
    if not options.report:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output: {options.output}: {error.strerror}; choose a folder that can be written"
            ) from error
    _train_and_report(studies, options)


def _check(options: argparse.Namespace) -> None:
    if not options.study:
        raise ValueError("STUDY: give at least one file or name; --list shows the names")
    if options.jobs < 1:
        raise ValueError(f"--jobs: {options.jobs} is not 1 or more")
    if len(set(options.seeds)) < len(options.seeds):
        raise ValueError("--seeds: one is named twice")
    if any("=" not in text for text in options.set):
        raise ValueError(f"--set: {options.set} is not a list of key=value")


def _asked_for(options: argparse.Namespace) -> list[Study]:
    """Returns the studies with what the options change, all of their configurations checked."""
    from dataclasses import replace

    from mone_megatron.lab.studies.definition import load_study

    studies = [load_study(where) for where in options.study]
    studies = [replace(each, overrides=(*each.overrides, *options.set)) for each in studies]
    if options.variants:
        studies = [each.only(options.variants) for each in studies]
    for study in studies:
        _ = study.configs  # before the first of them is trained
    return studies


def _train_and_report(studies: Sequence[Study], options: argparse.Namespace) -> None:
    from mone_megatron.counting import counted
    from mone_megatron.lab.studies import outcome, outcome_files, page, run_reports, runner
    from mone_megatron.whole_files import write_whole

    outcomes: list[outcome.Outcome] = []
    try:
        for study in studies:
            folder = options.output / study.name
            # A report may be asked for while the study is being trained.
            with nullcontext() if options.report else owned_folder("--output", folder):
                if not options.report:
                    runner.train(study, folder, options.seeds, jobs=options.jobs, say=say)
                found = outcome.read_outcome(study, folder, options.seeds)
                print(outcome_files.markdown(found), end="\n\n")
                for path in outcome_files.write(found, folder):
                    say(f"wrote {path}")
                if made := run_reports.write_missing(runner.places(study, folder, options.seeds)):
                    say(f"wrote {counted(made, 'report')} of runs, which the page leads to")
            outcomes.append(found)
    finally:
        # Also of what is done when a later one fails or is stopped.
        if outcomes:
            written = write_whole(options.output / page.PAGE_FILE, page.studies_page(outcomes))
            say(f"wrote {written}")


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; user errors are one line each."""
    options = _parser().parse_args(arguments)
    try:
        return exit_status(_run, options)
    except RuntimeError as error:
        print_error(str(error))
        return 1
