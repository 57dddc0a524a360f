"""Converts a checkpoint of any layout to a Hugging Face folder, on a CPU, one shard at a time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.display import harmless
from mone_megatron.large_imports import first_import_of
from mone_megatron.ownership import owned_path

_DESCRIPTION = """\
Convert a run's newest checkpoint, or one checkpoint, to a Hugging Face folder: safetensors,
configuration, tokenizer, generation settings and a model card. The layout it was trained on does
not matter, and no GPU is needed. A baseline is written as the stock architecture that holds it
(Qwen3MoeForCausalLM and the like) and needs no code of ours; MoNE is written with its model code
beside the weights.

It ends by loading what it wrote and comparing its logits and kept neurons with the training
model's, in fp32 on real text. Nothing is left in the output folder when anything fails.

With --push-to-hub the folder, model card included, is then uploaded to a new or empty repository of
the Hugging Face Hub, which others cannot see unless --public is given. Token and repository are
checked before anything is exported."""

_EPILOG = """\
exit status: 0 written and checked (and uploaded), 2 refused

examples:
  python tools/export_hf.py runs/quickstart/mone --output exports/mone
  python tools/export_hf.py runs/a/checkpoints/step_00001000 --output exports/a --dtype bf16
  python tools/export_hf.py runs/a --output exports/a --push-to-hub my-lab/mone-a"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="a run.dir, or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--architecture",
        default="auto",
        metavar="TYPE",
        help="auto (the stock one that holds the model, else mone), or a model type",
    )
    parser.add_argument(
        "--dtype",
        default="saved",
        metavar="DTYPE",
        help="fp32 (from the masters), bf16 or fp16; default: each tensor as saved",
    )
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest weights file, and about the memory used (default: 5)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the two models at the end (it holds both in memory, in fp32)",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the export to this repository, private (HF_TOKEN, or `hf auth login`)",
    )
    parser.add_argument(
        "--public", action="store_true", help="let everybody see what --push-to-hub uploads"
    )
    return parser


def _export(options: argparse.Namespace) -> None:
    if options.shard_gb <= 0:
        raise ValueError(f"--shard-gb: {options.shard_gb:g} is not above 0")
    if options.public and options.push_to_hub is None:
        raise ValueError("--public: nothing is uploaded without --push-to-hub OWNER/NAME")
    if not options.source.is_dir():
        raise ValueError(f"{options.source}: there is no such folder; give a run or a checkpoint")
    from mone_megatron.extras import calm_bars, require

    require("hf", "transformers", "safetensors")
    calm_bars()
    # Only now: transformers takes seconds to import.
    with first_import_of("torch"):
        from mone_megatron.hf import checks, export, text_format
        from mone_megatron.hf.source import Source, open_source
        from mone_megatron.serving.misread import misreadings

    repository = None
    if options.push_to_hub is not None:
        from mone_megatron.hf import hub

        repository = hub.find_repository(options.push_to_hub, private=not options.public)
    source: Source = open_source(options.source, say=say)
    architecture = export.choose_architecture(source, options.architecture)
    dtype = export.export_dtype(options.dtype)
    say(text_format.describe(source.framing, source.tokenizer_dir))
    say(f"{source.checkpoint.path} as {architecture.class_name} in {dtype or 'its own dtypes'}")
    outcome: list[str] = []

    def check(folder: Path) -> str:
        if options.no_check:
            return "not checked (--no-check)"
        say("comparing it with the training model on real text")
        found = checks.check_export(source, folder, dtype=dtype)
        if not found.holds:
            raise ValueError(f"{options.output}: not written: {found.describe()}")
        outcome.append(found.describe())
        return found.describe()

    exported = export.export(
        source,
        options.output,
        architecture=architecture,
        dtype=dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        check=check,
        progress=say,
    )
    print(f"wrote {exported.folder}: {exported.tensors} tensors, {exported.bytes / 1e6:,.1f} MB")
    for line in outcome:
        print(f"checked: {line}")
    written = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    for misreading in misreadings(written):
        say(f"warning: {misreading}")
    if repository is not None:
        who = "for its owners only" if repository.private else "for everybody"
        say(f"uploading it to {repository.address}, {who}")
        step = source.checkpoint.step
        hub.upload(exported.folder, repository, f"Step {step:,} of {source.config.run.name}")
        print(f"uploaded to {repository.address}")


def _owning(options: argparse.Namespace) -> None:
    with owned_path("--output", options.output):
        _export(options)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(_owning, options)
