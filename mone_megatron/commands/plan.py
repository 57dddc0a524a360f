"""Says before a run, without GPU or torch, whether it fits, how long it takes and what it costs."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, told
from mone_megatron.config.errors import ConfigError
from mone_megatron.config.load import compose
from mone_megatron.config.schema import Config
from mone_megatron.display import harmless
from mone_megatron.helpers import HelperError, ending, starting
from mone_megatron.ownership import owned_file, owned_folder
from mone_megatron.planning import plan_files
from mone_megatron.planning.budget import (
    Usage,
    active_are_measured,
    experts_are_fixed,
    neurons_are_fixed,
    usage_is_fixed,
)
from mone_megatron.planning.hardware import GPUS, Assumptions, find_gpu
from mone_megatron.planning.match import COUNTS, DIMENSIONS, SIDES, TOLERANCE, Pair, match
from mone_megatron.planning.plan import Machine, Plan, default_gpus, make_plan
from mone_megatron.planning.search import faster_layout, search
from mone_megatron.shipped_files import shipped
from mone_megatron.whole_files import write_json

_LAUNCHER = shipped("launch/slurm.sh")
_TOP = 10
# Flags that mean nothing without one of some others.
_BESIDE = {
    "dimension": ("match",),
    "side": ("match",),
    "tolerance": ("match",),
    "measured": ("match",),
    "write": ("match",),
    "top": ("search",),
    "hours": ("sbatch", "render"),
    "site": ("render",),
}

# All that finding a pair reads: it plans no run.
_OF_A_PAIR = {"overrides", "json", "match"} | {
    name for name, others in _BESIDE.items() if others == ("match",)
}
_NOT_GIVEN = object()

_DESCRIPTION = """\
Count parameters, memory, communication and operations of an experiment in a layout, and predict
time and cost on a named GPU. Counts are exact or tested (docs/planning.md); times are arithmetic on
published figures and assumptions, which flags change, and have not been validated on GPUs here."""

_EPILOG = """\
exit status: 0 when the run fits, 1 when it does not, 2 for what cannot be planned

examples:
  python tools/plan.py experiment=qwen3_30b_a3b_mone --gpus 16 --gpu H100
  python tools/plan.py experiment=flame_1_7b_mone --gpu A100 --price 1.80 train.recompute=selective
  python tools/plan.py experiment=mixtral_8x7b_moe --gpus 64 --search --top 5
  python tools/plan.py experiment=mone_2.8b --match activated --write conf/experiment
  python tools/plan.py experiment=mone_2.8b --match flops --side moe --dimension experts_per_token
  python tools/plan.py experiment=qwen3_30b_a3b_mone --gpus 32 --sbatch
  python tools/plan.py experiment=qwen3_30b_a3b_mone --gpus 32 --sbatch --render job.sbatch"""


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)} (default H100)")
    machine.add_argument("--gpus", type=int, help="in all (default: the fewest of the layout)")
    machine.add_argument("--gpus-per-node", type=int, default=8, help="default 8")
    machine.add_argument("--memory-gb", type=_number, help="of a GPU, instead of the published")
    machine.add_argument(
        "--network-gbs", type=_number, help="GB/s of a GPU to other nodes, likewise"
    )
    machine.add_argument("--nvlink-gbs", type=_number, help="GB/s of a GPU in its node, likewise")
    machine.add_argument(
        "--installed",
        nargs="+",
        default=[],
        choices=("transformer_engine", "deep_ep"),
        help="optional packages of the machine (default: none)",
    )
    machine.add_argument("--price", type=_number, help="of a GPU-hour; prints the cost")

    assumed = parser.add_argument_group("assumptions: shares of the published figures")
    default = Assumptions()
    for name, what in (
        ("matmul", "of the peak, in dense matrix products"),
        ("attention", "of the peak, in attention"),
        ("grouped", "of the peak, in the experts' products"),
        ("memory", "of the memory bandwidth"),
        ("links", "of NVLink and the network"),
    ):
        value = getattr(default, name)
        assumed.add_argument(f"--{name}", type=_number, default=value, help=f"{what} ({value:g})")
    assumed.add_argument(
        "--passes",
        type=_number,
        default=default.passes,
        help=f"over memory of a kept activation, forward and backward ({default.passes:g})",
    )
    assumed.add_argument(
        "--imbalance",
        type=_number,
        default=default.imbalance,
        help=f"rows of the busiest rank's experts over the mean ({default.imbalance:g})",
    )
    assumed.add_argument(
        "--reserve-gib",
        type=_number,
        default=default.reserve / 2**30,
        help=f"memory of CUDA, NCCL and fragmentation ({default.reserve / 2**30:g})",
    )

    search_flags = parser.add_argument_group("search")
    search_flags.add_argument("--search", action="store_true", help="rank the layouts of --gpus")
    search_flags.add_argument("--top", type=int, help=f"layouts to print (default {_TOP})")

    pairs = parser.add_argument_group("pairs of a MoE and a MoNE")
    pairs.add_argument("--match", choices=COUNTS, help="find a pair that is equal in this count")
    pairs.add_argument("--dimension", choices=DIMENSIONS, help=f"default {DIMENSIONS[0]}")
    pairs.add_argument("--side", choices=SIDES, help="it changes on (default mone)")
    pairs.add_argument("--tolerance", type=_number, help=f"relative (default {TOLERANCE:g})")
    pairs.add_argument(
        "--measured", type=Path, metavar="RUN",
        help="run.dir whose tokens say what a rule or router without a fixed count uses",
    )  # fmt: skip
    pairs.add_argument("--write", type=Path, metavar="DIR", help="write both as experiments")

    launch = parser.add_argument_group("launch")
    launch.add_argument("--sbatch", action="store_true", help="print the command that submits it")
    launch.add_argument("--hours", type=int, help="time limit (default: predicted)")
    launch.add_argument("--render", type=Path, metavar="FILE", help="write the job for sbatch")
    launch.add_argument("--site", type=Path, metavar="FILE", help="site file of the cluster")
    return parser


def _machine(options: argparse.Namespace, config: Config) -> Machine:
    figures = {
        "memory": options.memory_gb,
        "network": options.network_gbs,
        "nvlink": options.nvlink_gbs,
    }
    for name, flag in (
        ("memory", "--memory-gb"),
        ("network", "--network-gbs"),
        ("nvlink", "--nvlink-gbs"),
    ):
        if figures[name] is not None and figures[name] <= 0:
            raise ValueError(f"{flag}: {figures[name]:g} is not positive; use a number above 0")
    scaled = {name: None if value is None else value * 1e9 for name, value in figures.items()}
    assumed = Assumptions(
        matmul=options.matmul,
        attention=options.attention,
        grouped=options.grouped,
        memory=options.memory,
        links=options.links,
        passes=options.passes,
        imbalance=options.imbalance,
        reserve=options.reserve_gib * 2**30,
    )
    return Machine(
        gpu=find_gpu(options.gpu, **scaled),
        gpus=options.gpus if options.gpus is not None else default_gpus(config),
        gpus_per_node=options.gpus_per_node,
        assumed=assumed,
        installed=frozenset(options.installed),
    )


def _experiment_of(overrides: Sequence[str]) -> str:
    names = [text.split("=", 1)[1] for text in overrides if text.startswith("experiment=")]
    if not names:
        raise ConfigError("--write: needs an experiment to start from; add experiment=NAME")
    return names[-1]


def _write_pair(pair: Pair, overrides: Sequence[str], folder: Path) -> list[Path]:
    """Writes the two of a pair as files for conf/experiment and returns their paths."""
    base = _experiment_of(overrides)
    start = compose([f"experiment={base}"])
    stem = base.removesuffix("_mone").removesuffix("_moe").removeprefix("mone_")
    stem = stem.removeprefix("moe_")
    files: dict[Path, str] = {}
    for kind, config in (("moe", pair.moe), ("mone", pair.mone)):
        name = f"{stem}_equal_{pair.count}_{kind}"
        run = replace(config.run, name=name, dir=start.run.dir)
        changes = plan_files.changed_keys(start, replace(config, run=run))
        comment = f"Of a pair with equal {pair.count}; changed: {pair.changed or 'nothing'}."
        files[folder / f"{name}.yaml"] = plan_files.experiment_yaml(base, changes, comment)
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(f"--write: {path} is there and differs; remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


def _usage(options: argparse.Namespace, config: Config) -> Usage:
    """Returns what tokens use of the pair's MoNE model, where its method does not fix it."""
    mone = replace(config, mone=replace(config.mone, enabled=True))
    if options.measured is not None:
        if usage_is_fixed(mone):
            raise ConfigError(
                "--measured: the rule and the router fix what a token uses; leave it out"
            )
        # Only now: they take their time to import.
        from mone_megatron.report.runs import load_run
        from mone_megatron.report.usage import usage_of

        return usage_of(mone, load_run(options.measured))
    if not neurons_are_fixed(mone):
        print(
            f"note: mone.rule={mone.mone.rule} fixes no number of neurons; counted with "
            "mone.keep_ratio (--measured RUN counts what a run used)"
        )
    if active_are_measured(mone):
        print(
            f"note: model.activation={mone.model.activation} needs up projections where the gate "
            "is positive; counted with all (--measured RUN counts what a run used)"
        )
    if not experts_are_fixed(mone):
        print(
            f"note: model.router.kind={mone.model.router.kind} fixes no number of experts; counted "
            "with model.experts_per_token (--measured RUN counts what a run used)"
        )
    return Usage()


def _match(options: argparse.Namespace, config: Config) -> int:
    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    if not 0 <= tolerance < 1:
        raise ValueError(f"--tolerance: {tolerance:g} is outside [0, 1); use a share like 0.001")
    pair = match(
        config,
        options.match,
        dimension=options.dimension or DIMENSIONS[0],
        side=options.side or "mone",
        tolerance=tolerance,
        usage=_usage(options, config),
    )
    print("\n".join(plan_files.match_lines(pair)))
    if options.write is not None:
        with owned_folder("--write", options.write):
            written = _write_pair(pair, options.overrides, options.write)
        for path in written:
            print(f"wrote {path}")
    if options.json is not None:
        write_json(options.json, plan_files.match_json(pair))
        print(f"wrote {options.json}")
    return 0


def _given(arguments: Sequence[str] | None) -> set[str]:
    """Returns the names of the flags that a command line gives, also with what they are without."""
    parser = _parser()
    names = vars(parser.parse_intermixed_args([]))
    # argparse sets no default where there is a value.
    none = argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN))
    found = vars(parser.parse_intermixed_args(arguments, none))
    return {name for name, value in found.items() if value is not _NOT_GIVEN}


def _check(options: argparse.Namespace, given: set[str]) -> None:
    """Refuses flags that would be ignored and numbers that cannot be.

    Args:
        options: the command line.
        given: names of the flags that it gives.

    Raises:
        ValueError: naming the flag.
    """
    for name, others in _BESIDE.items():
        if name in given and not given.intersection(others):
            needed = " or ".join(f"--{other}" for other in others)
            raise ValueError(f"--{name}: means nothing without {needed}; add that, or leave it out")
    if "match" in given and (apart := sorted(given - _OF_A_PAIR)):
        flag = apart[0].replace("_", "-")
        raise ValueError(f"--{flag}: not with --match; plan the two of the pair by themselves")
    if options.price is not None and options.price < 0:
        raise ValueError(f"--price: {options.price:g} is negative; use 0 or more")
    for name in ("hours", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} is too few; use 1 or more")


def _render(plan: Plan, arguments: Sequence[str], options: argparse.Namespace) -> None:
    """Writes the job that launch/slurm.sh would submit.

    Raises:
        ValueError: what launch/slurm.sh says.
    """
    if not plan.fits:
        raise ValueError("--render: the run does not fit (above); nothing is written")
    site = [] if options.site is None else ["--site", str(options.site)]
    environment = dict(os.environ)
    if sys.prefix != sys.base_prefix:
        # Overrides are checked by the python that runs this.
        environment["VIRTUAL_ENV"] = sys.prefix
    with starting(str(_LAUNCHER)):
        done = subprocess.run(
            [str(_LAUNCHER), "--dry-run", *site, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        said = [line.removeprefix("error: ") for line in done.stderr.strip().splitlines()]
        raise ValueError("\n".join(said) or f"--render: {_LAUNCHER} {ending(done.returncode)}")
    options.render.parent.mkdir(parents=True, exist_ok=True)
    options.render.write_text(done.stdout, encoding="utf-8")
    # SLURM makes no folders: without the one of its log a job ends without a word.
    log = next(line for line in done.stdout.splitlines() if line.startswith("#SBATCH --output="))
    folder = Path(log.split("=", 1)[1].strip('"')).parent
    print(f"wrote {options.render}; submit it with:")
    print(f"mkdir -p {shlex.quote(str(folder))} && sbatch {shlex.quote(str(options.render))}")


def _run(options: argparse.Namespace, given: set[str]) -> int:
    _check(options, given)
    config = compose(options.overrides)
    if options.match is not None:
        return _match(options, config)
    machine = _machine(options, config)
    if options.search:
        found = search(config, machine)
        lines = plan_files.search_lines(found, machine.gpus, options.top or _TOP)
        given_plan = None
        with suppress(ConfigError):
            given_plan = make_plan(config, machine)
        lines += plan_files.found_lines(found[0], given_plan)
        content: object = plan_files.search_json(found, options.price)
        plan, extra = found[0].plan, list(found[0].overrides)
    else:
        plan, extra = make_plan(config, machine), []
        lines = plan_files.plan_lines(plan, options.price, faster=faster_layout(plan))
        content = plan_files.plan_json(plan, options.price)
    print("\n".join(lines))
    if options.json is not None:
        write_json(options.json, content)
        print(f"wrote {options.json}")
    arguments = plan_files.launch_arguments(plan, [*options.overrides, *extra], options.hours)
    if options.sbatch:
        print(shlex.join(["launch/slurm.sh", *arguments]))
    if options.render is not None:
        _render(plan, arguments, options)
    return 0 if plan.fits else 1


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    # Flags may stand before, between and behind overrides.
    options = _parser().parse_intermixed_args(arguments)

    def owning(options: argparse.Namespace) -> int:
        try:
            with owned_file("--json", options.json), owned_file("--render", options.render):
                return _run(options, _given(arguments))
        except HelperError:
            raise
        except OSError as error:
            raise ValueError(f"{told(error)}; name another file") from None

    return exit_status(owning, options)
