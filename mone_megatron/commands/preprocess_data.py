r"""Turns text into the .bin/.idx files that data.source=indexed reads.

The input is any number of files or quoted globs: JSON lines (.jsonl, .ndjson), plain text (.txt,
.md, .py; one document a file, or see --document-separator), both also as .gz or .zst, Parquet and
Arrow; and folders: what save_to_disk of Hugging Face's datasets wrote, or a folder of Parquet.
An input that is bad is named by its file and line, row or row group.

  python tools/preprocess_data.py 'books/*.jsonl' --output corpora/books --tokenizer my-tokenizer
  python tools/preprocess_data.py wiki.txt --output corpora/wiki --train-tokenizer 32000
  python tools/preprocess_data.py web.jsonl 'code/*.jsonl' --json-key 'code/*.jsonl=content' \
      --output corpora/mixed --tokenizer my-tokenizer
  python tools/preprocess_data.py datasets/fineweb --split train --output corpora/fineweb \
      --tokenizer my-tokenizer

Train on the result with data.source=indexed data.paths=[corpora/books].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.data.documents import expand_inputs
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files
from mone_megatron.data.reading_options import add_reading, reading_settings
from mone_megatron.data.text_keys import DEFAULT_KEY, TextKeys, parse_keys
from mone_megatron.display import harmless


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="+", metavar="FILE", help="files, quoted globs, folders of datasets"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx, PREFIX.meta.json and the folder PREFIX.tokenizer",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="a Hugging Face tokenizer folder (tokenizer.json)",
    )
    which.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="trains a byte-level BPE of this size on the input",
    )
    parser.add_argument(
        "--train-megabytes",
        type=float,
        default=0.0,
        metavar="MB",
        help="trains the tokenizer on the first MB of text only (default: all)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        help="the token that ends a document (default: the tokenizer's eos_token)",
    )
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="turns special tokens spelled out in the text into their ids (default: plain text)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="begins each document with the tokenizer's BOS: as its own template does, always, or "
        "never (%(default)s); kept, and followed wherever the model reads text",
    )
    add_reading(parser)
    parser.add_argument(
        "--json-key",
        action="append",
        default=[],
        metavar="[PATTERN=]KEY",
        help="key of the text in JSON lines (text); with a pattern, of the files that match it; "
        "may be given several times, and the last that matches counts",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="[PATTERN=]NAME",
        help="column of the text in Parquet and Arrow (text), likewise",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of folders of datasets: train, validation, ..."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="tokenizing processes; the output does not depend on it (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replaces an existing output")
    return parser.parse_args(given)


@harmless
def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line and returns 0 on success, 2 on bad input, 130 when interrupted."""
    return exit_status(_run, _parse(given), interrupted="interrupted; nothing was written")


def _keys(option: str, given: Sequence[str]) -> str | TextKeys:
    return parse_keys(option, given) if given else DEFAULT_KEY


def _run(options: argparse.Namespace) -> None:
    summary = preprocess_files(
        expand_inputs(options.inputs, options.split),
        options.output,
        TokenizerSettings(
            folder=options.tokenizer,
            train_vocab_size=options.train_tokenizer,
            train_megabytes=options.train_megabytes,
            eod_token=options.eod_token,
            parse_special_tokens=options.parse_special_tokens,
            bos=options.bos,
        ),
        inputs=reading_settings(
            options,
            json_key=_keys("--json-key", options.json_key),
            column=_keys("--column", options.column),
        ),
        workers=options.workers,
        overwrite=options.overwrite,
        read_as={"split": options.split},
    )
    for remark in summary.remarks:
        say(remark)
    print(
        f"{summary.prefix}: {summary.tokens} tokens in {summary.documents} documents"
        f" ({summary.skipped_empty} empty ones skipped), vocabulary {summary.vocab_size},"
        f" {summary.beginning}"
    )
