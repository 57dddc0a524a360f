"""Benchmarks as ratios within one run: the trainer, MoNE's cost, checkpoints, the selection."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Measure, on this machine's CPU (select: or GPU), ratios of things timed in turn (A B B A) in one
run, after warm-up. Each is printed as: median (smallest..largest).

  spine   tokens/s of the trainer over a bare loop on the same megatron-core objects
  cost    step time of MoNE over MoE, and what each part of the difference takes
  save    how long a checkpoint stops training, async over sync
  select  the exact top-k mask against torch.topk + scatter and torch.kthvalue"""

_EPILOG = """\
exit status: 0, or 2 for a configuration or data that cannot work

examples:
  python tools/bench.py spine
  python tools/bench.py cost --processes 2 --output runs/bench/cost.json
  python tools/bench.py cost mone.keep_ratio=0.5 model.expert_ffn_hidden_size=512
  python tools/bench.py save --processes 2 parallel.expert=2
  python tools/bench.py select --rows 2048 --neurons 256 1024
  python tools/bench.py select --device cuda --dtype bf16 --rows 32768 --neurons 768 1024"""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument(
        "--processes", type=_positive, default=1, help="gloo ranks on this machine (default 1)"
    )
    steps.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")

    spine = commands.add_parser("spine", parents=[shared, steps], help="the trainer's overhead")
    spine.add_argument("--experiment", default="tiny_moe", help="default tiny_moe")
    spine.add_argument("--repeats", type=_positive, default=12, help="of each (default 12)")
    spine.add_argument("--steps", type=_positive, default=20, help="a repeat (default 20)")

    cost = commands.add_parser("cost", parents=[shared, steps], help="MoNE's cost")
    cost.add_argument("--moe", default="quickstart_moe", help="default quickstart_moe")
    cost.add_argument("--mone", default="quickstart_mone", help="default quickstart_mone")
    cost.add_argument("--repeats", type=_positive, default=20, help="steps of each (default 20)")
    cost.add_argument(
        "--part-repeats", type=_positive, default=60, help="measurements of each part (default 60)"
    )

    save = commands.add_parser("save", parents=[shared, steps], help="checkpoints")
    save.add_argument("--experiment", default="quickstart_mone", help="default quickstart_mone")
    save.add_argument("--repeats", type=_positive, default=10, help="of each (default 10)")

    select = commands.add_parser("select", parents=[shared], help="the top-k mask")
    select.add_argument("--rows", type=_positive, nargs="+", default=[64, 512, 4096])
    select.add_argument("--neurons", type=_positive, nargs="+", default=[64, 256, 1024, 4096])
    select.add_argument("--threads", type=_positive, default=1, help="of torch (default 1)")
    select.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    select.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    select.add_argument("--keep-ratio", type=float, default=0.25)
    select.add_argument("--repeats", type=_positive, default=15, help="of each (default 15)")
    return parser


def _run(options: argparse.Namespace) -> None:
    # In here, since each rank imports this file before it can prepare for megatron-core.
    from mone_megatron.benchmarks import output, ranks

    if options.command == "select":
        import torch

        from mone_megatron.benchmarks.select import measure_select

        on_gpu = options.device == "cuda"
        hardware = ranks.use_gpu() if on_gpu else ranks.use_threads(options.threads)
        cells = measure_select(
            options.rows,
            options.neurons,
            options.keep_ratio,
            repeats=options.repeats,
            device=torch.device(options.device),
            dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
        )
        lines, result = output.select_lines(cells), cells
    elif options.command == "spine":
        config = ranks.prepare(
            [f"experiment={options.experiment}", *options.overrides], options.processes
        )
        result = ranks.run_spine(
            config, options.processes, repeats=options.repeats, steps=options.steps
        )
        hardware, lines = result.hardware, output.spine_lines(result)
    elif options.command == "save":
        config = ranks.prepare(
            [f"experiment={options.experiment}", *options.overrides], options.processes
        )
        result = ranks.run_save(config, options.processes, repeats=options.repeats)
        hardware, lines = result.hardware, output.save_lines(result)
    else:
        expert = [f"parallel.expert={options.processes}", *options.overrides]
        result = ranks.run_cost(
            ranks.prepare([f"experiment={options.moe}", *expert], options.processes),
            ranks.prepare([f"experiment={options.mone}", *expert], options.processes),
            options.processes,
            repeats=options.repeats,
            part_repeats=options.part_repeats,
        )
        hardware, lines = result.hardware, output.cost_lines(result)
    facts = output.environment(hardware)
    print("\n".join([*output.environment_lines(facts), *lines]))
    if options.output is not None:
        output.write_json(options.output, options.command, facts, result)
        print(f"wrote {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
