"""Shows which experts and neurons tokens use: of runs, checkpoints, exports, any MoE, or traces."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from mone_megatron.command_line import Parser, check_at_least_1, exit_status, say
from mone_megatron.data.reading_options import add_reading, check_reading_used, reading_settings
from mone_megatron.display import harmless
from mone_megatron.evaluation.command_line import add_placement
from mone_megatron.methods.scores import SCORES
from mone_megatron.ownership import owned_folder

_DESCRIPTION = """\
Run models on text and count which experts and which neurons each token uses: load, co-activation,
saturation against the final checkpoint and between adjacent tokens, specialisation on tokens and
domains. A model is a run of ours (all its checkpoints), a checkpoint, an export or any MoE in the
format of transformers; or a trace, recorded by --trace or by Megatron-LM
(--moe-routing-trace-path). The last MODEL is the final checkpoint that the others are held against.

A text is a run (its validation split), the prefix of a .bin/.idx pair, or a .txt, .jsonl or
.parquet file. Each is a domain of its own, unless --domain-field names what tells them apart.

Writes routing.html (a page to explore, one file), analysis.json, tables in Parquet and figures."""

_WINDOW = "tokens of a window (the model's, up to 2048); a run's samples keep theirs"

_EPILOG = """\
exit status: 0 analysed, 2 for what cannot be analysed

examples:
  python tools/analyze_run.py runs/quickstart/mone --text runs/quickstart/mone \\
      --output routing/mone
  python tools/analyze_run.py exports/mone --text code.txt prose.txt --output routing/export
  python tools/analyze_run.py runs/mine --text all.jsonl --domain-field source --trace traces \\
      --output routing/mine
  python tools/analyze_run.py traces/mine_step_100 traces/mine_step_200 --output routing/two"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, model or trace")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the results")

    text = parser.add_argument_group("text")
    text.add_argument("--text", nargs="+", default=[], metavar="TEXT", help="what models read")
    text.add_argument(
        "--domain-field", metavar="KEY", help="of JSON lines or Parquet: its values are the domains"
    )
    text.add_argument("--text-key", default="text", help="of JSON lines and Parquet (text)")
    add_reading(text)
    text.add_argument("--seq-length", type=int, help=_WINDOW)
    text.add_argument("--max-tokens", type=int, default=32768, help="of each domain (32768)")

    record = parser.add_argument_group("recording")
    record.add_argument(
        "--trace", type=Path, metavar="DIR", help="keep the traces here; those there are used again"
    )
    record.add_argument(
        "--keep-ratio", type=float, help="neurons to look at in experts without selection (0.25)"
    )
    record.add_argument(
        "--score",
        choices=SCORES.names,
        help="what ranks them (abs_activation)",
    )
    record.add_argument("--num-experts", type=int, help="of a layer, for traces of Megatron-LM")

    compute = parser.add_argument_group("computation")
    add_placement(compute)

    count = parser.add_argument_group("counting")
    count.add_argument("--min-count", type=int, default=8, help="occurrences for a share (8)")
    count.add_argument("--expert-tokens", type=int, default=1000, help="frequent tokens (1000)")
    count.add_argument("--neuron-tokens", type=int, default=128, help="for neurons (128)")
    count.add_argument(
        "--neurons-together", type=int, default=32, help="neurons of an expert in pairs (32)"
    )
    count.add_argument(
        "--experts-together", type=int, default=8, help="experts whose neurons are paired (8)"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    check_at_least_1(
        options,
        "seq_length",
        "max_tokens",
        "num_experts",
        "batch_size",
        "min_count",
        "expert_tokens",
        "neuron_tokens",
        "neurons_together",
        "experts_together",
    )
    if options.keep_ratio is not None and not 0 < options.keep_ratio <= 1:
        raise ValueError(f"--keep-ratio: {options.keep_ratio} is not in (0, 1]")


def _check_used(options: argparse.Namespace, kinds: Collection[str]) -> None:
    """Refuses options that would be ignored.

    Raises:
        ValueError: naming the first.
    """
    if options.num_experts is not None and "megatron" not in kinds:
        raise ValueError("--num-experts: of use with traces of Megatron-LM only; leave it out")
    if "model" in kinds:
        return
    for name in (
        "text",
        "domain_field",
        "format",
        "document_separator",
        "seq_length",
        "keep_ratio",
        "score",
    ):
        if vars(options)[name]:
            raise ValueError(
                f"--{name.replace('_', '-')}: traces hold what was read and chosen; leave it out, "
                "or give a model"
            )


def _run(options: argparse.Namespace) -> None:
    from mone_megatron.extras import calm_bars, require

    calm_bars()
    # Only now: these take seconds to import.
    from mone_megatron.lab.routing.explorer import write_explorer
    from mone_megatron.lab.routing.figures import write_figures
    from mone_megatron.lab.routing.statistics import Limits
    from mone_megatron.lab.routing.statistics_files import (
        Analysis,
        check_folder,
        text_report,
        write_analysis,
    )
    from mone_megatron.lab.routing.subjects import Traced, analyze, subjects

    how = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
    }
    check_folder(options.output, how)
    chosen = subjects(options.models)
    kinds = {subject.kind for subject in chosen}
    _check_used(options, kinds)
    record: Traced | None = None
    if "model" in kinds:
        require("hf", "transformers", "safetensors")
        # Longer still, and not needed for traces.
        from mone_megatron.evaluation.corpora import open_corpus, reads_files
        from mone_megatron.evaluation.models import choose_device, choose_dtype
        from mone_megatron.lab.routing.recording import Recorder, Settings
        from mone_megatron.lab.routing.texts import Text

        device = choose_device(options.device)
        key = options.text_key
        documents = reading_settings(options, json_key=key, column=key)
        opened = [open_corpus(place, documents) for place in options.text]
        check_reading_used(options, reads_files=reads_files(opened))
        record = Recorder(
            Text(options.text, documents, options.domain_field),
            Settings(
                seq_length=options.seq_length,
                max_tokens=options.max_tokens,
                batch_size=options.batch_size,
                keep_ratio=options.keep_ratio,
                score=options.score,
                dtype=choose_dtype(options.dtype, device),
                device=device,
                trust_remote_code=options.trust_remote_code,
            ),
            say,
        )
    limits = Limits(
        expert_tokens=options.expert_tokens,
        neuron_tokens=options.neuron_tokens,
        min_count=options.min_count,
        neurons_together=options.neurons_together,
        experts_together=options.experts_together,
    )
    header, results = analyze(
        chosen, record, limits, keep=options.trace, num_experts=options.num_experts, say=say
    )
    analysis = Analysis(results, header, limits, how)
    paths = write_analysis(analysis, options.output)
    paths += write_figures(analysis, options.output)
    paths.append(write_explorer(analysis, options.output))
    print(text_report(analysis))
    print()
    for path in paths:
        print(f"wrote {path}")


def _owning(options: argparse.Namespace) -> None:
    _check(options)
    with ExitStack() as owned:
        owned.enter_context(owned_folder("--output", options.output))
        if options.trace is not None and options.trace.resolve() != options.output.resolve():
            owned.enter_context(owned_folder("--trace", options.trace))
        _run(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
