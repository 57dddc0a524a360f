"""Evaluates models on tasks and corpora: runs, exports, or any model in the transformers format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, check_at_least_1, exit_status, once, say
from mone_megatron.data.reading_options import add_reading, check_reading_used, reading_settings
from mone_megatron.display import harmless
from mone_megatron.evaluation.command_line import add_placement, labels_of
from mone_megatron.large_imports import first_import_of
from mone_megatron.ownership import owned_file
from mone_megatron.whole_files import write_whole

_DESCRIPTION = """\
Measure any number of models on tasks of lm-evaluation-harness and by perplexity, with standard
errors, and compare them with the first one. A model is a run of ours (its newest checkpoint), a
checkpoint, an export, or any folder in the format of transformers.

Tasks are names of lm-evaluation-harness, YAML files of tasks on your own data, or a list:
usual (the ten usual ones) or flame (FLAME-MoE's). A corpus is a run (its validation split, sample
for sample), the prefix of a .bin/.idx pair, or a .txt, .jsonl or .parquet file."""

_EPILOG = """\
exit status: 0 measured, 2 for what cannot be measured

examples:
  python tools/eval_hf.py runs/quickstart/moe runs/quickstart/mone --perplexity runs/quickstart/moe
  python tools/eval_hf.py exports/mone --tasks usual --json mone.json
  python tools/eval_hf.py --write-example-tasks tasks
  python tools/eval_hf.py runs/quickstart/mone --tasks tasks/*.yaml --limit 100"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="run, checkpoint or model folder"
    )
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="names to show, one a model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument(
        "--write-example-tasks",
        type=Path,
        metavar="DIR",
        help="write two tasks on the text of Python's standard library into DIR, and end",
    )

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names, files, lists")
    tasks.add_argument(
        "--include-path",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="folders whose tasks go by their names",
    )
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question (the task's)")
    tasks.add_argument("--limit", type=int, help="questions of each task (all)")

    text = parser.add_argument_group("perplexity")
    text.add_argument("--perplexity", nargs="+", default=[], metavar="CORPUS", help="what to read")
    text.add_argument("--seq-length", type=int, help="tokens of a window (the models', up to 2048)")
    text.add_argument("--max-tokens", type=int, help="of each corpus (all)")
    text.add_argument("--text-key", default="text", help="of JSON lines and Parquet (text)")
    add_reading(text)

    compute = parser.add_argument_group("computation")
    compute.add_argument(
        "--server",
        metavar="URL",
        help="ask a server of tools/serve.py, or another vLLM, that serves the one MODEL given",
    )
    add_placement(compute)
    return parser


def _check(options: argparse.Namespace) -> None:
    if not options.models:
        raise ValueError("MODEL: give at least one run, export or model")
    if not options.tasks and not options.perplexity:
        raise ValueError("--tasks, --perplexity: nothing to measure; give at least one")
    if options.server is not None and (len(options.models) > 1 or options.perplexity):
        raise ValueError("--server: takes one MODEL, and --tasks only; a perplexity needs weights")
    check_at_least_1(options, "limit", "seq_length", "max_tokens", "batch_size")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot: {options.num_fewshot} is negative; use 0 or more")


def _run(options: argparse.Namespace) -> None:
    if options.write_example_tasks is not None:
        from mone_megatron.evaluation.example_tasks import write_example_tasks

        for path in write_example_tasks(options.write_example_tasks):
            print(f"wrote {path}")
        return
    _check(options)
    labels = labels_of(options.models, options.labels)

    from mone_megatron.extras import calm_bars, require

    require("hf", "transformers", "safetensors", "lm_eval")
    calm_bars()
    # Only now: these take seconds to import.
    with first_import_of("torch"):
        from mone_megatron.evaluation import evaluate, score_files
        from mone_megatron.evaluation.corpora import open_corpus, reads_files
        from mone_megatron.evaluation.models import choose_device, choose_dtype, look_at
        from mone_megatron.evaluation.served import ServedModel
        from mone_megatron.evaluation.tasks import expand, load_tasks

    device = choose_device(options.device)
    key = options.text_key
    settings = reading_settings(options, json_key=key, column=key)
    corpora = [open_corpus(where, settings) for where in options.perplexity]
    check_reading_used(options, reads_files=reads_files(corpora))
    trusted = options.trust_remote_code
    models = [look_at(where, trust_remote_code=trusted) for where in options.models]
    seq_length = options.seq_length or evaluate.common_length(models)
    tell = once(say)
    texts = [evaluate.read_corpora(facts, corpora, seq_length, say=tell) for facts in models]
    requests = expand(options.tasks)
    tasks = None
    if requests:
        tasks = load_tasks(
            requests, include_paths=options.include_path, num_fewshot=options.num_fewshot
        )
    how = evaluate.Settings(
        batch_size=options.batch_size,
        limit=options.limit,
        seq_length=seq_length,
        max_tokens=options.max_tokens,
        dtype=choose_dtype(options.dtype, device),
        device=device,
        trust_remote_code=trusted,
    )
    if options.server is not None:
        assert tasks is not None
        served = ServedModel.at(options.server, batch_size=options.batch_size)
        results = [
            evaluate.evaluate_served(
                models[0], served, label=labels[0], tasks=tasks, limit=options.limit, say=say
            )
        ]
    else:
        results = [
            evaluate.evaluate_model(
                facts, label=label, tasks=tasks, corpora=text, settings=how, say=say
            )
            for facts, label, text in zip(models, labels, texts, strict=True)
        ]
    compared = evaluate.compare(results)
    print(score_files.table(results, compared))
    print()
    print("\n".join(score_files.notes(results)))
    if options.json is not None:
        names = [request.spec for request in requests]
        write_whole(options.json, score_files.as_json(results, compared, how, names))
        print(f"wrote {options.json}")


def _owning(options: argparse.Namespace) -> None:
    with owned_file("--json", options.json):
        _run(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
