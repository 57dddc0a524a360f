"""Measures what the tie rule does, in training or to a model's weights."""

from __future__ import annotations

import argparse
from typing import Any

from mone_megatron.command_line import say, seed
from mone_megatron.commands.benchmarks import arguments
from mone_megatron.commands.benchmarks.benchmark import Benchmark, Outcome


def _add_options(parser: argparse.ArgumentParser) -> None:
    arguments.add_overrides(parser)
    parser.add_argument(
        "--orders",
        nargs="+",
        choices=("lowest", "highest", "random"),
        default=["lowest", "highest", "random"],
        help="which of equal neurons is kept, in bf16 (default all)",
    )
    parser.add_argument("--no-fp32", action="store_true", help="leave the fp32 model out")
    training = parser.add_argument_group("training, the default")
    training.add_argument("--experiment", metavar="NAME", help="default quickstart_mone")
    training.add_argument("--seeds", type=seed, nargs="+", help="default 1")
    training.add_argument("--steps", type=arguments.positive, help="of each model (default 200)")
    training.add_argument(
        "--counted-steps",
        type=arguments.positive,
        help="the last of them, counted over (default 50)",
    )
    weights = parser.add_argument_group("a trained model in place of training")
    weights.add_argument(
        "--model", metavar="WHERE", help="a run, an export or a transformers model"
    )
    weights.add_argument("--text", metavar="CORPUS", help="a run, a .bin/.idx prefix or a file")
    weights.add_argument("--keep-ratio", type=float, help="default 0.25")
    weights.add_argument("--score", help="default abs_activation")
    weights.add_argument("--max-tokens", type=arguments.positive, help="of the text (default 4096)")
    weights.add_argument("--seq-length", type=arguments.positive, help="default 256")


# Options of `ties` with their defaults: those of the training, and those of a model's weights.
_TRAINING_DEFAULTS: dict[str, Any] = {
    "experiment": "quickstart_mone", "seeds": [1], "steps": 200, "counted_steps": 50,
}  # fmt: skip
_MODEL_DEFAULTS: dict[str, Any] = {
    "text": None, "keep_ratio": 0.25, "score": "abs_activation", "max_tokens": 4096,
    "seq_length": 256,
}  # fmt: skip


def _measure(options: argparse.Namespace) -> Outcome:
    unused = _MODEL_DEFAULTS if options.model is None else _TRAINING_DEFAULTS
    for name in unused:
        if getattr(options, name) is not None:
            needed = "needs" if options.model is None else "is of no use with"
            raise ValueError(f"--{name.replace('_', '-')}: {needed} --model")
    if options.model is not None and options.overrides:
        raise ValueError(f"{options.overrides[0]}: is of no use with --model")
    for name, default in (_TRAINING_DEFAULTS if options.model is None else _MODEL_DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return _ties_in_training(options) if options.model is None else _ties_of_model(options)


def _ties_in_training(options: argparse.Namespace) -> Outcome:
    from mone_megatron.data.prepare import prepare_data
    from mone_megatron.lab.benchmarks import ranks, result_files, result_plots
    from mone_megatron.lab.benchmarks.ties import TieWay
    from mone_megatron.methods.rules import RULES

    if not options.counted_steps <= options.steps:
        raise ValueError(
            f"--counted-steps: {options.counted_steps} is more than --steps={options.steps}"
        )
    config = ranks.checked([f"experiment={options.experiment}", "parallel=data",
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
    prepare_data(config)
    result = ranks.run_ties(
        config,
        ways=TieWay.all_of(options.orders, fp32=not options.no_fp32),
        seeds=options.seeds,
        steps=options.steps,
        counted_steps=options.counted_steps,
    )
    return Outcome(
        result.hardware,
        result_files.training_ties_lines(result),
        result,
        lambda: result_plots.ties_figure(
            {f"{one.way}, seed {one.seed}": one.ties for one in result.trained}
        ),
    )


def _ties_of_model(options: argparse.Namespace) -> Outcome:
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
    return Outcome(
        hardware,
        result_files.model_ties_lines(result),
        result,
        lambda: result_plots.ties_figure({one.way: one.ties for one in result.measured}),
    )


BENCHMARK = Benchmark(
    name="ties",
    help="what the tie rule does",
    description=(
        "what the tie rule does to the load of neurons and to the loss, in training or of a model"
    ),
    examples=(
        "ties --seeds 1 2 --steps 200 model.expert_ffn_hidden_size=512",
        "ties --model runs/a --text corpus.txt --output ties.json",
    ),
    add_options=_add_options,
    measure=_measure,
)
