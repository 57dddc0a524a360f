"""Prunes the neurons of trained models, token by token, and measures what that costs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mone_megatron.command_line import Parser, check_at_least_1, exit_status, once, say, seed
from mone_megatron.data.reading_options import add_reading, check_reading_used, reading_settings
from mone_megatron.display import harmless
from mone_megatron.evaluation.command_line import add_placement, labels_of
from mone_megatron.lab.sparsification.plans import (
    DEFAULT_SHARES,
    LAYER,
    LEAST_CALIBRATION_TOKENS,
    RANDOM,
    RANK,
    REMOVALS,
    RULES,
    SCORES,
    TARGETS,
    THRESHOLD,
    THRESHOLD_OF,
    check_named,
    check_scores,
    check_shares,
    check_tops,
)
from mone_megatron.ownership import owned_folder

_DESCRIPTION = """\
Rank the neurons of every expert for every token, leave out the lowest 0 to 99%, and measure the
perplexity and, if asked, tasks of lm-evaluation-harness, with standard errors and paired
differences to the model as it is. No weight is changed. A model is a run of ours (its newest
checkpoint), a checkpoint, an export, or any folder in the format of transformers: a mixture of
experts behind its experts interface, or a dense model with MLPs of gate_proj, up_proj and
down_proj.

The corpus is a run (its validation split), the prefix of a .bin/.idx pair, or a .txt, .jsonl or
.parquet file. --output gets the figures, tables and everything measured; the same command again
goes on where it was stopped."""

_EPILOG = """\
scores:
{scores}

rules:
{rules}

removals:
{removals}

exit status: 0 measured, 2 for what cannot be measured

examples:
  python tools/sparsify_hf.py runs/quickstart/moe runs/quickstart/mone --all-neurons \\
      --perplexity runs/quickstart/moe --output pruned
  python tools/sparsify_hf.py models/Qwen3-30B-A3B --perplexity text.jsonl --max-tokens 65536 \\
      --stream --device cuda --scores abs_activation wina random --output pruned_qwen
  python tools/sparsify_hf.py exports/moe --perplexity text.jsonl --loss-budget 0.02 --output out"""


def _parser() -> argparse.ArgumentParser:
    scores, rules, removals = (
        "\n".join(f"  {name:16} {meaning}" for name, meaning in known.items())
        for known in (SCORES, RULES, REMOVALS)
    )
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG.format(scores=scores, rules=rules, removals=removals),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="run, checkpoint or model folder"
    )
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="names to show, one a model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new, empty, or to go on with")

    prune = parser.add_argument_group("pruning")
    prune.add_argument(
        "--scores", nargs="+", default=["abs_activation"], metavar="SCORE", help="(abs_activation)"
    )
    prune.add_argument(
        "--shares", nargs="+", type=float, default=list(DEFAULT_SHARES), metavar="SHARE",
        help="of neurons to prune, in [0, 1)",
    )  # fmt: skip
    prune.add_argument(
        "--rule", nargs="+", default=[RANK], metavar="RULE",
        help=f"how scores decide; {THRESHOLD} needs --calibration ({RANK})",
    )  # fmt: skip
    prune.add_argument(
        "--threshold-of", metavar="WHAT",
        help=f"what has a threshold of its own, of {', '.join(THRESHOLD_OF)} ({LAYER})",
    )  # fmt: skip
    where = prune.add_mutually_exclusive_group()
    where.add_argument(
        "--apply-to", nargs="+", choices=TARGETS,
        help="kinds of neurons (routed experts; of a model without any, its dense MLPs)",
    )  # fmt: skip
    where.add_argument(
        "--experts-only", action="store_true", help="refuse models without routed experts"
    )
    prune.add_argument(
        "--all-neurons", action="store_true",
        help="a model that selects neurons computes all of them; otherwise it prunes on top",
    )  # fmt: skip
    prune.add_argument("--seed", type=seed, default=1234, help="of random scores (1234)")
    prune.add_argument(
        "--top", nargs="+", type=float, default=[0.5], metavar="SHARE",
        help="thresholds of |a| for these shares of the largest (0.5)",
    )  # fmt: skip

    text = parser.add_argument_group("perplexity")
    text.add_argument("--perplexity", metavar="CORPUS", help="what to read")
    text.add_argument(
        "--seq-length", type=int,
        help="tokens of a window (the models', up to 2048); a run's samples keep theirs",
    )  # fmt: skip
    text.add_argument("--max-tokens", type=int, help="of the corpus (all)")
    text.add_argument("--text-key", default="text", help="of JSON lines and Parquet (text)")
    add_reading(text)

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="as of eval_hf.py")
    tasks.add_argument(
        "--include-path", nargs="+", type=Path, default=[], metavar="DIR",
        help="folders whose tasks go by their names",
    )  # fmt: skip
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question (the task's)")
    tasks.add_argument("--limit", type=int, help="questions of each task (all)")

    budget = parser.add_argument_group("shares for each layer")
    budget.add_argument(
        "--loss-budget", type=float, metavar="NATS",
        help="find the shares that prune most with the loss at most so much higher",
    )  # fmt: skip
    budget.add_argument("--budget-score", metavar="SCORE", help="(the first of --scores)")
    budget.add_argument(
        "--budget-shares", nargs="+", type=float, metavar="SHARE",
        help="to measure each layer's sensitivity at (those of --shares)",
    )  # fmt: skip

    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", metavar="CORPUS",
        help="to set thresholds on, and to choose shares on (of these that of --perplexity)",
    )  # fmt: skip
    calibration.add_argument("--calibration-tokens", type=int, help="of it (--max-tokens)")

    removal = parser.add_argument_group("removal")
    removal.add_argument(
        "--remove", nargs="+", default=[], metavar="WAY",
        help="experts or neurons that go at the same --shares, to compare; see below",
    )  # fmt: skip

    tails = parser.add_argument_group("truncated tails")
    tails.add_argument(
        "--cett", nargs="+", type=float, default=[], metavar="ERROR",
        help="cumulative errors of tail truncation, in (0, 1), to truncate every layer at",
    )  # fmt: skip
    tails.add_argument(
        "--ppl-rise", nargs="+", type=float, default=[], metavar="PERCENT",
        help="find the CETT at which the perplexity of the calibration text rises so much",
    )  # fmt: skip

    compute = parser.add_argument_group("computation")
    compute.add_argument(
        "--stream", action="store_true", help="hold one layer of the model at once"
    )
    compute.add_argument(
        "--stream-memory", type=float, default=8.0, metavar="GB",
        help="of main memory for hidden states between layers (8)",
    )  # fmt: skip
    add_placement(compute)
    return parser


def _check(options: argparse.Namespace) -> None:
    if not options.models:
        raise ValueError("MODEL: give at least one run, export or model")
    if options.perplexity is None:
        raise ValueError("--perplexity: give a corpus to read")
    if options.output is None:
        raise ValueError("--output: give a folder for the results")
    options.scores = check_scores(options.scores)
    options.shares = check_shares(options.shares)
    options.top = check_tops(options.top)
    check_at_least_1(
        options, "limit", "seq_length", "max_tokens", "batch_size", "calibration_tokens"
    )
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot: {options.num_fewshot} is negative; use 0 or more")
    if not 0 < options.stream_memory < math.inf:
        raise ValueError(f"--stream-memory: {options.stream_memory:g} is no size above 0")
    if options.stream and options.trust_remote_code:
        raise ValueError("--stream: runs no code of a model's own; leave --trust-remote-code out")
    _check_budget(options)
    _check_rules(options)
    _check_tails(options)
    _check_calibration(options)


def _check_rules(options: argparse.Namespace) -> None:
    options.rule = check_named(options.rule, RULES, "--rule")
    if THRESHOLD not in options.rule:
        if options.threshold_of is not None:
            raise ValueError(
                f"--threshold-of: of use with --rule {THRESHOLD} only; add it, or leave this out"
            )
    elif RANDOM in options.scores:
        raise ValueError(
            f"--rule {THRESHOLD}: no text says anything about {RANDOM} scores; leave {RANDOM} out "
            "of --scores"
        )
    (options.threshold_of,) = check_named(
        [options.threshold_of or LAYER], THRESHOLD_OF, "--threshold-of"
    )


def _check_tails(options: argparse.Namespace) -> None:
    options.remove = check_named(options.remove, REMOVALS, "--remove")
    for cett in options.cett:
        if not 0 < cett < 1:
            raise ValueError(f"--cett: {cett:g} is not in (0, 1), a relative error")
    for rise in options.ppl_rise:
        if not 0 < rise < math.inf:
            raise ValueError(f"--ppl-rise: {rise:g} is not above 0, a rise in percent")
    options.cett, options.ppl_rise = (
        tuple(sorted(set(values))) for values in (options.cett, options.ppl_rise)
    )


def _calibrated(options: argparse.Namespace) -> str | None:
    """Returns the option that needs a text of its own to calibrate on; None if none does."""
    if THRESHOLD in options.rule:
        return f"--rule {THRESHOLD}"
    if options.cett:
        return "--cett"
    if options.ppl_rise:
        return "--ppl-rise"
    return "--remove" if options.remove else None


def _check_calibration(options: argparse.Namespace) -> None:
    asking = _calibrated(options)
    if asking is not None:
        if options.calibration is None:
            raise ValueError(f"{asking}: give --calibration CORPUS, a text to calibrate on")
        return
    if options.loss_budget is not None:
        return
    for name in ("calibration", "calibration_tokens"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: nothing is calibrated; add --loss-budget, --rule "
                f"{THRESHOLD}, --remove, --cett or --ppl-rise, or leave it out"
            )


def _check_budget(options: argparse.Namespace) -> None:
    if options.loss_budget is None:
        for name in ("budget_score", "budget_shares"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: of use with --loss-budget only")
        return
    if not options.loss_budget > 0:
        raise ValueError(f"--loss-budget: {options.loss_budget:g} is not above 0")
    if options.budget_score is None:
        options.budget_score = options.scores[0]
    elif options.budget_score not in SCORES:
        raise ValueError(
            f"--budget-score: {options.budget_score!r} is unknown; use one of {', '.join(SCORES)}"
        )
    given = options.shares if options.budget_shares is None else options.budget_shares
    above = check_shares(given, "--budget-shares")
    options.budget_shares = tuple(share for share in above if share > 0)
    if not options.budget_shares:
        raise ValueError("--budget-shares: give at least one share above 0")


def _run(options: argparse.Namespace) -> None:
    labels = labels_of(options.models, options.labels)

    # Only now: these take seconds to import.
    from mone_megatron.evaluation import evaluate
    from mone_megatron.evaluation.corpora import open_corpus, reads_files
    from mone_megatron.evaluation.models import ModelFacts, choose_device, choose_dtype, look_at
    from mone_megatron.evaluation.tasks import expand, load_tasks
    from mone_megatron.evaluation.token_bytes import bytes_of_tokens
    from mone_megatron.lab.sparsification import measured_study, result_files
    from mone_megatron.lab.sparsification.engine import Text
    from mone_megatron.lab.sparsification.findings import BudgetSettings
    from mone_megatron.lab.sparsification.kept_results import open_results

    device = choose_device(options.device)
    inputs = reading_settings(options, json_key=options.text_key, column=options.text_key)
    corpora = [open_corpus(options.perplexity, inputs)]
    if options.calibration is not None:
        corpora.append(open_corpus(options.calibration, inputs))
    check_reading_used(options, reads_files=reads_files(corpora))
    trusted = options.trust_remote_code
    models = [look_at(where, trust_remote_code=trusted) for where in options.models]
    seq_length = options.seq_length or evaluate.common_length(models)
    requests = expand(options.tasks)
    tasks = None
    if requests:
        tasks = load_tasks(
            requests, include_paths=options.include_path, num_fewshot=options.num_fewshot
        )

    tell = once(say)

    def texts(facts: ModelFacts) -> tuple[Text, Text]:
        """Returns the text to measure on, and the one to choose shares on."""
        sizes = bytes_of_tokens(facts.tokenizer.backend_tokenizer, facts.vocab_size)
        read = [
            Text(corpus.name, windows, sizes, options.batch_size, options.max_tokens)
            for corpus, windows in evaluate.read_corpora(facts, corpora, seq_length, say=tell)
        ]
        if len(read) == 1 and options.calibration_tokens is None:
            return read[0], read[0]
        limit = options.calibration_tokens or options.max_tokens
        other = read[-1]
        return read[0], Text(other.name, other.windows, sizes, options.batch_size, limit)

    budget = None
    if options.loss_budget is not None:
        budget = BudgetSettings(options.loss_budget, options.budget_score, options.budget_shares)
    how = measured_study.StudySettings(
        scores=options.scores,
        shares=options.shares,
        tops=options.top,
        targets=("routed",) if options.experts_only else options.apply_to,
        all_neurons=options.all_neurons,
        seed=options.seed,
        batch_size=options.batch_size,
        limit=options.limit,
        budget=budget,
        dtype=choose_dtype(options.dtype, device),
        device=device,
        stream=options.stream,
        stream_bytes=int(options.stream_memory * 1e9),
        trust_remote_code=trusted,
        rules=options.rule,
        threshold_of=options.threshold_of,
        cetts=options.cett,
        rises=options.ppl_rise,
        removals=options.remove,
        least_calibration=LEAST_CALIBRATION_TOKENS if _calibrated(options) else 0,
    )
    studies = [
        measured_study.look_into(measured_study.Subject(label, facts, *texts(facts), tasks), how)
        for label, facts in zip(labels, models, strict=True)
    ]
    # What a kept number depends on: another value of any of these is another study.
    settings: dict[str, Any] = {
        "seq_length": seq_length,
        "max_tokens": options.max_tokens,
        "batch_size": options.batch_size,
        "dtype": str(how.dtype),
        "device": device.split(":")[0],
        "stream": options.stream,
        "all_neurons": options.all_neurons,
        "seed": options.seed,
        "tasks": list(options.tasks),
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
    }
    results = open_results(options.output, settings)
    if len(results):
        say(f"{options.output}: going on with {len(results)} results")
    found = [one.run(results, say) for one in studies]
    files = result_files.write(options.output, found, settings)
    print(result_files.report(found))
    print()
    print(f"wrote {', '.join(file.name for file in files)} in {options.output}")


def _owning(options: argparse.Namespace) -> None:
    _check(options)
    with owned_folder("--output", options.output):
        _run(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
