"""Benchmarks layers, selection, steps, peers, decoding, trainer, saves, as ratios in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.display import harmless
from mone_megatron.ownership import owned_file

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_DESCRIPTION = """\
Measure ratios of things timed in turn (A B B A) in one run, after warm-up. Each is printed as:
median (smallest..largest).

  layer     experts forward and backward: MoNE in its modes and usual selections beside MoE
  select    the exact top-k mask against torch.topk + scatter and torch.kthvalue
  ties      what the tie rule does to the load of neurons and to the loss, in training or of a model
  train     training steps of MoNE in its modes beside MoE
  peers     training steps of MoE and MoNE beside transformers' and their matrix products
  cost      step time of MoNE over MoE, and what each part of the difference takes
  decode    one decoding step of the experts: rows of kept neurons beside all rows
  generate  texts of a whole model, the same
  spine     tokens/s of the trainer over a bare loop on the same megatron-core objects
  save      how long a checkpoint stops training, async over sync"""

_EPILOG = """\
exit status: 0, or 2 for a configuration or data that cannot work

examples:
  python tools/bench.py layer --hidden 512 --neurons 256 --experts 8 --chosen 2 --tokens 1024
  python tools/bench.py layer --device cuda --dtype bf16 --tokens 32768 --output layer.json
  python tools/bench.py select --rows 2048 --neurons 256 1024
  python tools/bench.py ties --seeds 1 2 --steps 200 model.expert_ffn_hidden_size=512
  python tools/bench.py ties --model runs/a --text corpus.txt --output ties.json
  python tools/bench.py train --processes 2 parallel.expert=2
  python tools/bench.py peers --quick --output peers.json
  python tools/bench.py cost mone.keep_ratio=0.5 model.expert_ffn_hidden_size=512
  python tools/bench.py decode --batch 1 4 16 --keep-ratio 0.125 0.25 --experts 64
  python tools/bench.py generate --layers 8 --neurons 768
  python tools/bench.py spine
  python tools/bench.py save --processes 2 parallel.expert=2"""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = Parser(add_help=False)
    shared.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the result as JSON, and a plot by it",
    )
    steps = Parser(add_help=False)
    steps.add_argument(
        "--processes",
        type=_positive,
        default=1,
        help="gloo ranks on this machine (default 1); on GPUs those that torchrun started",
    )
    steps.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    pair = Parser(add_help=False)
    pair.add_argument("--moe", default="quickstart_moe", help="default quickstart_moe")
    pair.add_argument("--mone", default="quickstart_mone", help="default quickstart_mone")
    on = Parser(add_help=False)
    on.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    place = Parser(add_help=False, parents=[on])
    place.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    place.add_argument(
        "--threads", type=_not_negative, default=1, help="of torch; 0 for one a core (default 1)"
    )
    sizes = Parser(add_help=False)
    sizes.add_argument("--hidden", type=_positive, default=1024, help="h (default 1024)")
    sizes.add_argument("--neurons", type=_positive, default=512, help="f (default 512)")
    sizes.add_argument("--experts", type=_positive, default=16, help="default 16")
    sizes.add_argument("--chosen", type=_positive, default=4, help="of a token (default 4)")

    layer = commands.add_parser("layer", parents=[shared, place, sizes], help="training a layer")
    layer.add_argument("--tokens", type=_positive, default=1024, help="default 1024")
    layer.add_argument("--keep-ratio", type=float, default=0.25)
    layer.add_argument("--repeats", type=_positive, default=15, help="of each (default 15)")

    select = commands.add_parser("select", parents=[shared, place], help="the top-k mask")
    select.add_argument("--rows", type=_positive, nargs="+", default=[64, 512, 4096])
    select.add_argument("--neurons", type=_positive, nargs="+", default=[64, 256, 1024, 4096])
    select.add_argument("--keep-ratio", type=float, default=0.25)
    select.add_argument("--repeats", type=_positive, default=15, help="of each (default 15)")

    ties = commands.add_parser("ties", parents=[shared], help="what the tie rule does")
    ties.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    ties.add_argument(
        "--orders",
        nargs="+",
        choices=("lowest", "highest", "random"),
        default=["lowest", "highest", "random"],
        help="which of equal neurons is kept, in bf16 (default all)",
    )
    ties.add_argument("--no-fp32", action="store_true", help="leave the fp32 model out")
    training = ties.add_argument_group("training, the default")
    training.add_argument("--experiment", metavar="NAME", help="default quickstart_mone")
    training.add_argument("--seeds", type=_not_negative, nargs="+", help="default 1")
    training.add_argument("--steps", type=_positive, help="of each model (default 200)")
    training.add_argument(
        "--counted-steps", type=_positive, help="the last of them, counted over (default 50)"
    )
    weights = ties.add_argument_group("a trained model in place of training")
    weights.add_argument(
        "--model", metavar="WHERE", help="a run, an export or a transformers model"
    )
    weights.add_argument("--text", metavar="CORPUS", help="a run, a .bin/.idx prefix or a file")
    weights.add_argument("--keep-ratio", type=float, help="default 0.25")
    weights.add_argument("--score", help="default abs_activation")
    weights.add_argument("--max-tokens", type=_positive, help="of the text (default 4096)")
    weights.add_argument("--seq-length", type=_positive, help="default 256")

    train = commands.add_parser("train", parents=[shared, steps, on, pair], help="training steps")
    train.add_argument("--repeats", type=_positive, default=10, help="of each (default 10)")
    train.add_argument("--steps", type=_positive, default=1, help="a repeat (default 1)")

    peers = commands.add_parser("peers", parents=[shared, pair], help="steps beside transformers'")
    peers.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    peers.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    peers.add_argument("--repeats", type=_positive, help="turns of each (default 10)")
    peers.add_argument(
        "--experts", type=_positive, nargs="*", help="also with so many (default 16 32 64)"
    )
    peers.add_argument(
        "--micro-batch", type=_positive, nargs="*", help="also with such microbatches (default 8)"
    )
    peers.add_argument("--layers", type=_positive, nargs="*", help="also so deep (default 8)")
    peers.add_argument("--starts", type=_not_negative, help="starts of each (default 2)")
    peers.add_argument(
        "--quick",
        action="store_true",
        help="other defaults: 32 experts beside the size as given, one start",
    )

    cost = commands.add_parser(
        "cost", parents=[shared, steps, on, pair], help="MoNE's cost, by parts"
    )
    cost.add_argument("--repeats", type=_positive, default=20, help="steps of each (default 20)")
    cost.add_argument(
        "--part-repeats", type=_positive, default=60, help="measurements of each part (default 60)"
    )

    decode = commands.add_parser("decode", parents=[shared, place, sizes], help="decoding a layer")
    decode.add_argument("--batch", type=_positive, nargs="+", default=[1, 4, 16], help="tokens")
    decode.add_argument("--keep-ratio", type=float, nargs="+", default=[0.125, 0.25])
    decode.add_argument("--repeats", type=_positive, default=15, help="of each (default 15)")

    generate = commands.add_parser("generate", parents=[shared, place, sizes], help="whole texts")
    generate.add_argument("--layers", type=_positive, default=4, help="default 4")
    generate.add_argument("--new-tokens", type=_positive, default=32, help="default 32")
    generate.add_argument("--keep-ratio", type=float, default=0.25)
    generate.add_argument("--repeats", type=_positive, default=5, help="of each (default 5)")

    spine = commands.add_parser("spine", parents=[shared, steps, on], help="the trainer's overhead")
    spine.add_argument("--experiment", default="tiny_moe", help="default tiny_moe")
    spine.add_argument("--repeats", type=_positive, default=12, help="of each (default 12)")
    spine.add_argument("--steps", type=_positive, default=20, help="a repeat (default 20)")

    save = commands.add_parser("save", parents=[shared, steps, on], help="checkpoints")
    save.add_argument("--experiment", default="quickstart_mone", help="default quickstart_mone")
    save.add_argument("--repeats", type=_positive, default=10, help="of each (default 10)")
    return parser


class _Outcome(NamedTuple):
    """Holds what a benchmark gives: lines for people, results and a picture for files."""

    hardware: str
    lines: list[str]
    result: Any
    draw: Callable[[], Figure] | None = None


# Imports are in the functions, since each rank imports this file before it can prepare for
# megatron-core, and since some need the hf extra.


def _layer(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.layer import LayerShape, measure_layer

    shape = LayerShape(
        options.hidden, options.neurons, options.experts, options.chosen, options.tokens
    )
    device, hardware = ranks.use_device(options.device, options.threads)
    result = measure_layer(
        shape, options.keep_ratio, repeats=options.repeats, device=device, dtype=_dtype(options)
    )
    ratios = {cost.name: cost.over_moe for cost in result.costs}
    return _Outcome(
        hardware,
        result_files.layer_lines(result),
        result,
        lambda: result_plots.bars("Experts, forward and backward", "time / MoE", ratios),
    )


def _select(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.select import measure_select

    device, hardware = ranks.use_device(options.device, options.threads)
    cells = measure_select(
        options.rows,
        options.neurons,
        options.keep_ratio,
        repeats=options.repeats,
        device=device,
        dtype=_dtype(options),
    )
    return _Outcome(
        hardware, result_files.select_lines(cells), cells, lambda: result_plots.select_figure(cells)
    )


# Options of `ties` with their defaults: those of the training, and those of a model's weights.
_TIES_TRAINING: dict[str, Any] = {
    "experiment": "quickstart_mone", "seeds": [1], "steps": 200, "counted_steps": 50,
}  # fmt: skip
_TIES_MODEL: dict[str, Any] = {
    "text": None, "keep_ratio": 0.25, "score": "abs_activation", "max_tokens": 4096,
    "seq_length": 256,
}  # fmt: skip


def _ties(options: argparse.Namespace) -> _Outcome:
    unused = _TIES_MODEL if options.model is None else _TIES_TRAINING
    for name in unused:
        if getattr(options, name) is not None:
            needed = "needs" if options.model is None else "is of no use with"
            raise ValueError(f"--{name.replace('_', '-')}: {needed} --model")
    if options.model is not None and options.overrides:
        raise ValueError(f"{options.overrides[0]}: is of no use with --model")
    for name, default in (_TIES_TRAINING if options.model is None else _TIES_MODEL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return _ties_in_training(options) if options.model is None else _ties_of_model(options)


def _ties_in_training(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.ties import TieWay
    from mone_megatron.methods.rules import RULES

    if not options.counted_steps <= options.steps:
        raise ValueError(
            f"--counted-steps: {options.counted_steps} is more than --steps={options.steps}"
        )
    config = ranks.prepare([f"experiment={options.experiment}", "parallel=data",
                            *options.overrides], 1)  # fmt: skip
    if not config.mone.enabled:
        raise ValueError(
            f"--experiment: {options.experiment} selects no neurons, so it has no ties to count; "
            "give one of MoNE, or mone.enabled=true"
        )
    if not RULES[config.mone.rule].top_k:
        raise ValueError(
            f"mone.rule: {config.mone.rule} does not keep the K largest, so ties decide nothing of "
            "the kind; use mone.rule=topk"
        )
    result = ranks.run_ties(
        config,
        ways=TieWay.all_of(options.orders, fp32=not options.no_fp32),
        seeds=options.seeds,
        steps=options.steps,
        counted_steps=options.counted_steps,
    )
    return _Outcome(
        result.hardware,
        result_files.training_ties_lines(result),
        result,
        lambda: result_plots.ties_figure(
            {f"{one.way}, seed {one.seed}": one.ties for one in result.trained}
        ),
    )


def _ties_of_model(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.ties import TieWay

    if options.text is None:
        raise ValueError("--text: give a corpus for --model to read")
    require("hf", "transformers")
    _, hardware = ranks.use_device("cpu", 1)
    from mone_megatron.lab.benchmarks.ties_model import measure_model

    result = measure_model(
        options.model,
        options.text,
        ways=TieWay.all_of(options.orders, fp32=not options.no_fp32),
        keep_ratio=options.keep_ratio,
        score=options.score,
        max_tokens=options.max_tokens,
        seq_length=options.seq_length,
        say=say,
    )
    return _Outcome(
        hardware,
        result_files.model_ties_lines(result),
        result,
        lambda: result_plots.ties_figure({one.way: one.ties for one in result.measured}),
    )


def _train(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots

    processes = options.processes
    moe, mone = (
        ranks.prepare([f"experiment={name}", *options.overrides], processes, device=options.device)
        for name in (options.moe, options.mone)
    )
    result = ranks.run_train(moe, mone, processes, repeats=options.repeats, steps=options.steps)
    ratios = {cost.name: cost.over_moe for cost in result.costs}
    return _Outcome(
        result.hardware,
        result_files.train_lines(result),
        result,
        lambda: result_plots.bars(f"Training steps of {options.mone}", "step time / MoE", ratios),
    )


# Defaults of `peers`, and those of `peers --quick`.
_PEERS: dict[str, Any] = {
    "repeats": 10, "experts": [16, 32, 64], "micro_batch": [8], "layers": [8], "starts": 2,
}  # fmt: skip
_PEERS_QUICK = _PEERS | {"experts": [32], "micro_batch": [], "layers": [], "starts": 1}
# Turns at sizes that are no goal, such as more experts than these.
_FEW_TURNS = 4
_MOST_EXPERTS_OF_GOALS = 32


def _peers(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.peers.compare import Size, measure_peers

    require("hf", "transformers")
    for name, default in (_PEERS_QUICK if options.quick else _PEERS).items():
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
    return _Outcome(
        hardware,
        result_files.peers_lines(result),
        result,
        lambda: result_plots.peers_figure(result),
    )


def _cost(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    expert = [f"parallel.expert={options.processes}", *options.overrides]
    moe, mone = (
        ranks.prepare([f"experiment={name}", *expert], options.processes, device=options.device)
        for name in (options.moe, options.mone)
    )
    result = ranks.run_cost(
        moe,
        mone,
        options.processes,
        repeats=options.repeats,
        part_repeats=options.part_repeats,
    )
    return _Outcome(result.hardware, result_files.cost_lines(result), result)


def _decode(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.layer import LayerShape

    require("hf", "transformers")
    shape = LayerShape(options.hidden, options.neurons, options.experts, options.chosen, 1)
    device, hardware = ranks.use_device(options.device, options.threads)
    from mone_megatron.lab.benchmarks.decode import measure_decode

    result = measure_decode(
        shape,
        options.batch,
        options.keep_ratio,
        repeats=options.repeats,
        device=device,
        dtype=_dtype(options),
    )
    return _Outcome(
        hardware,
        result_files.decode_lines(result),
        result,
        lambda: result_plots.decode_figure(result),
    )


def _generate(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.extras import require
    from mone_megatron.lab.benchmarks import ranks, result_files
    from mone_megatron.lab.benchmarks.layer import LayerShape

    require("hf", "transformers")
    shape = LayerShape(options.hidden, options.neurons, options.experts, options.chosen, 1)
    device, hardware = ranks.use_device(options.device, options.threads)
    from mone_megatron.lab.benchmarks.generate import measure_generate

    result = measure_generate(
        shape,
        options.keep_ratio,
        layers=options.layers,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        device=device,
        dtype=_dtype(options),
    )
    return _Outcome(hardware, result_files.generate_lines(result), result)


def _spine(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    config = ranks.prepare(
        [f"experiment={options.experiment}", *options.overrides],
        options.processes,
        device=options.device,
    )
    result = ranks.run_spine(
        config, options.processes, repeats=options.repeats, steps=options.steps
    )
    return _Outcome(result.hardware, result_files.spine_lines(result), result)


def _save(options: argparse.Namespace) -> _Outcome:
    from mone_megatron.lab.benchmarks import ranks, result_files

    config = ranks.prepare(
        [f"experiment={options.experiment}", *options.overrides],
        options.processes,
        device=options.device,
    )
    result = ranks.run_save(config, options.processes, repeats=options.repeats)
    return _Outcome(result.hardware, result_files.save_lines(result), result)


def _dtype(options: argparse.Namespace) -> torch.dtype:
    import torch

    return torch.bfloat16 if options.dtype == "bf16" else torch.float32


_COMMANDS: dict[str, Callable[[argparse.Namespace], _Outcome]] = {
    "layer": _layer,
    "select": _select,
    "ties": _ties,
    "train": _train,
    "peers": _peers,
    "cost": _cost,
    "decode": _decode,
    "generate": _generate,
    "spine": _spine,
    "save": _save,
}


def _run(options: argparse.Namespace) -> None:
    from mone_megatron.lab.benchmarks import result_files

    outcome = _COMMANDS[options.command](options)
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
