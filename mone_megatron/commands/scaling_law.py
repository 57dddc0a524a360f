"""Fits scaling laws to runs: coefficients with intervals, held-out error, optima, plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mone_megatron.command_line import Parser, exit_status
from mone_megatron.display import harmless
from mone_megatron.lab.scaling_law.bootstrap import DEFAULT_RESAMPLES
from mone_megatron.lab.scaling_law.fit import ALL_STARTS, DEFAULT_DELTA
from mone_megatron.lab.scaling_law.fit_files import JSON_FILE, text_report, write_study
from mone_megatron.lab.scaling_law.fitted_study import run_study
from mone_megatron.lab.scaling_law.isoflop import DEFAULT_TOLERANCE
from mone_megatron.lab.scaling_law.results import METHODS, Options, Request
from mone_megatron.lab.scaling_law.run_table import read_runs
from mone_megatron.lab.scaling_law.table import (
    FLOPS_PER_PARAM_TOKEN,
    ColumnNames,
    Table,
    keep_only_ratio,
    parse_count,
    read_csv,
)
from mone_megatron.ownership import owned_folder
from mone_megatron.report.files import check_output

_DESCRIPTION = """\
Fit L(N, D) = E + A/N^alpha + B/D^beta to the final losses of runs (log-Huber, L-BFGS from many
starts), with --neuron-term L(N, D, r) = E + A/(N r^gamma)^alpha + B/D^beta, and IsoFLOP parabolas.
The input is one CSV table or folders of our runs. docs/scaling-laws.md explains every number."""

_EPILOG = """\
exit status: 0 fitted, 2 input that cannot be fitted

examples:
  python tools/scaling_law.py sweep.csv --output fits/sweep
  python tools/scaling_law.py sweep.csv --output fits/sweep --methods parametric isoflop \\
      --budget 1e21 --predict 1.7B,100B
  python tools/scaling_law.py runs/sweep/*/ --output fits/runs --neuron-term --run-loss train"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="one CSV table, or the run.dir of each run"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")

    _add_fits(parser.add_argument_group("what to fit"))
    _add_settings(parser.add_argument_group("how"))
    _add_columns(parser.add_argument_group("columns of a CSV table"))
    _add_runs(parser.add_argument_group("folders of runs"))
    return parser


def _add_fits(group: argparse._ArgumentGroup) -> None:
    """Adds what is fitted, allocated and predicted."""
    group.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["parametric"], help="fits to make"
    )
    group.add_argument(
        "--neuron-term",
        action="store_true",
        help="fit how the keep ratio r enters; N then counts all neurons",
    )
    group.add_argument(
        "--only-keep-ratio", type=float, metavar="R", help="fit the rows of one keep ratio"
    )
    group.add_argument(
        "--budget",
        nargs="+",
        type=_count,
        default=[],
        metavar="C",
        help="FLOPs to allocate to parameters and tokens",
    )
    group.add_argument(
        "--keep-ratio", type=float, metavar="R", help="of the models of --budget (default: 1)"
    )
    group.add_argument(
        "--predict",
        nargs="+",
        type=_request,
        default=[],
        metavar="N,D[,R]",
        help="points to predict, such as 1.7B,100B or with a keep ratio 1.7B,100B,0.25",
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    """Adds how the fits are made and how their errors are estimated."""
    group.add_argument(
        "--delta",
        type=float,
        default=DEFAULT_DELTA,
        help="where the Huber loss of the log loss turns linear (default: %(default)s)",
    )
    group.add_argument(
        "--starts",
        type=int,
        default=ALL_STARTS,
        metavar="N",
        help="starting points, drawn from a grid of %(default)s (default: all)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of starts, folds, resamples (default: %(default)s)"
    )
    group.add_argument(
        "--bootstrap",
        type=int,
        default=DEFAULT_RESAMPLES,
        metavar="N",
        help="resamples for the intervals, 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--bootstrap-kind",
        choices=("rows", "normal"),
        default="rows",
        help="draw runs with repetition, or normal errors for small tables (default: %(default)s)",
    )
    group.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of the intervals (default: %(default)s)",
    )
    group.add_argument(
        "--holdout",
        type=int,
        default=1,
        metavar="N",
        help="largest FLOP budgets to predict from the others, 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--folds",
        type=int,
        default=5,
        metavar="N",
        help="cross-validation folds, 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--budget-tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        metavar="SHARE",
        help="how far apart the FLOPs of one budget may be (default: %(default)s)",
    )
    group.add_argument(
        "--parabola-width",
        type=float,
        metavar="FACTOR",
        help="parabolas through the sizes within this factor of a budget's best only",
    )
    group.add_argument(
        "--allow-outside",
        action="store_true",
        help="use parabolas' minima outside the sizes that were tried",
    )
    group.add_argument(
        "--flops-per-param-token",
        type=float,
        metavar="K",
        help="C = K N D for budgets (default: the table's median) and for a table without FLOPs "
        f"or without tokens (default: {FLOPS_PER_PARAM_TOKEN:g})",
    )
    group.add_argument(
        "--allow-mismatch", action="store_true", help="fit runs that are not comparable"
    )
    group.add_argument(
        "--allow-duplicates",
        action="store_true",
        help="take rows of one point and one seed as replicates",
    )
    group.add_argument("--quiet", action="store_true", help="no progress lines")


def _add_columns(group: argparse._ArgumentGroup) -> None:
    """Adds the names of the columns."""
    group.add_argument("--params-column", default="params", metavar="NAME", help="N")
    group.add_argument("--tokens-column", default="tokens", metavar="NAME", help="D")
    group.add_argument("--loss-column", default="loss", metavar="NAME")
    group.add_argument("--flops-column", metavar="NAME", help="default: flops, if it is there")
    group.add_argument(
        "--keep-ratio-column", metavar="NAME", help="default: keep_ratio, if it is there"
    )
    group.add_argument(
        "--active-column",
        metavar="NAME",
        help="parameters that a token activates of those in N: their share is the keep ratio",
    )
    group.add_argument("--run-column", metavar="NAME", help="default: run, if it is there")
    group.add_argument("--seed-column", metavar="NAME", help="default: seed, if it is there")
    group.add_argument(
        "--data-column", metavar="NAME", help="must be equal in all rows (default: data)"
    )
    group.add_argument(
        "--tokens-from-flops", action="store_true", help="no tokens column: D = C / (K N)"
    )


def _add_runs(group: argparse._ArgumentGroup) -> None:
    """Adds what is read of the folders of runs."""
    group.add_argument(
        "--run-params",
        choices=("activated", "neurons_only", "all_neurons", "total"),
        help="N (default: activated, gate counted; all_neurons with --neuron-term)",
    )
    group.add_argument(
        "--run-loss",
        choices=("validation", "train"),
        help="last validation loss (default) or mean of the last 5%% of the train losses",
    )
    group.add_argument(
        "--run-flops",
        choices=("ideal", "realised"),
        help="FLOPs that the method needs (default) or that dense products execute",
    )


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_run, options)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    check_output(Path(options.output), JSON_FILE)
    with owned_folder("--output", Path(options.output)):
        table = _read(options)
        if options.only_keep_ratio is not None:
            table = keep_only_ratio(table, options.only_keep_ratio)
        study = run_study(table, _study_options(options))
        print(text_report(study))
        paths = write_study(study, options.output)
    print()
    for path in paths:
        print(f"wrote {path}")


def _check(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}: give 0 or more")
    if "isoflop" not in options.methods:
        _refuse(
            options, ("parabola_width", "allow_outside"),
            "is about parabolas: add isoflop to --methods",
        )  # fmt: skip


def _read(options: argparse.Namespace) -> Table:
    folders = [path for path in options.inputs if Path(path).is_dir()]
    if folders and len(folders) < len(options.inputs):
        raise ValueError("give one CSV table or folders of runs, not both")
    per_param_token = options.flops_per_param_token
    if folders:
        _refuse(options, _TABLE_OPTIONS, "is about CSV tables, not folders of runs")
        return read_runs(
            folders,
            params_of=options.run_params or ("all_neurons" if options.neuron_term else "activated"),
            loss_of=options.run_loss or "validation",
            flops_of=options.run_flops or "ideal",
            allow_duplicates=options.allow_duplicates,
        )
    if len(options.inputs) > 1:
        raise ValueError(f"{len(options.inputs)} CSV tables: put their rows into one")
    _refuse(options, ("run_params", "run_loss", "run_flops"), "is about folders of runs")
    return read_csv(
        options.inputs[0],
        ColumnNames(
            params=options.params_column,
            tokens=options.tokens_column,
            loss=options.loss_column,
            flops=options.flops_column,
            keep_ratio=options.keep_ratio_column,
            active=options.active_column,
            run=options.run_column,
            seed=options.seed_column,
            data=options.data_column,
        ),
        tokens_from_flops=options.tokens_from_flops,
        flops_per_param_token=FLOPS_PER_PARAM_TOKEN if per_param_token is None else per_param_token,
        allow_duplicates=options.allow_duplicates,
    )


_TABLE_OPTIONS = (
    *("flops_column", "keep_ratio_column", "active_column", "run_column", "seed_column"),
    *("data_column", "tokens_from_flops"),
)


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuses options that would be ignored."""
    for name in names:
        value: Any = vars(options)[name]
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def _study_options(options: argparse.Namespace) -> Options:
    parametric = "parametric" in options.methods
    if options.neuron_term and not parametric:
        raise ValueError("--neuron-term is about the parametric fit: add it to --methods")
    if options.predict and not parametric:
        raise ValueError("--predict is about the parametric fit: add it to --methods")
    if not options.neuron_term:
        if options.keep_ratio is not None:
            raise ValueError("--keep-ratio has no effect without --neuron-term")
        if any(request.ratio != 1 for request in options.predict):
            raise ValueError("--predict with a keep ratio needs --neuron-term")
    return Options(
        methods=tuple(method for method in METHODS if method in options.methods),
        delta=options.delta,
        neuron_term=options.neuron_term,
        starts=options.starts,
        seed=options.seed,
        resamples=options.bootstrap,
        bootstrap_kind=options.bootstrap_kind,
        confidence=options.confidence,
        holdout_budgets=options.holdout,
        folds=options.folds,
        budget_tolerance=options.budget_tolerance,
        parabola_width=options.parabola_width,
        allow_outside=options.allow_outside,
        allow_mismatch=options.allow_mismatch,
        budgets=tuple(options.budget),
        keep_ratio=1.0 if options.keep_ratio is None else options.keep_ratio,
        flops_per_param_token=options.flops_per_param_token,
        requests=tuple(options.predict),
        progress=not options.quiet,
    )


def _count(text: str) -> float:
    try:
        value = parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _request(text: str) -> Request:
    parts = text.split(",")
    if len(parts) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,D or N,D,R: write 1.7B,100B")
    numbers = [_count(part) for part in parts]
    if len(numbers) == 3 and numbers[2] > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the keep ratio R is a share, 0 to 1")
    return Request(*numbers)
