"""Turns text into the .bin/.idx files that data.source=indexed reads.

The input is any number of files or quoted globs: JSON lines (.jsonl, .ndjson, .jsonl.gz), plain
text (.txt, .md, .py, .txt.gz; one document a file, or see --document-separator) and Parquet.

  python tools/preprocess_data.py 'books/*.jsonl' --output corpora/books --tokenizer my-tokenizer
  python tools/preprocess_data.py wiki.txt --output corpora/wiki --train-tokenizer 32000

Train on the result with data.source=indexed data.paths=[corpora/books].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mone_megatron.data.documents import InputSettings, expand_inputs
from mone_megatron.data.preprocess import TokenizerSettings, preprocess_files


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE", help="input files or quoted globs")
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
        "--format",
        choices=("jsonl", "text", "parquet"),
        help="the format of every input (default: by extension)",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in JSON lines (%(default)s)",
    )
    parser.add_argument(
        "--column",
        default="text",
        metavar="NAME",
        help="column of the text in Parquet (%(default)s)",
    )
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help=r"splits plain text files into documents; \n and \t are understood",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="tokenizing processes; the output does not depend on it (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replaces an existing output")
    return parser.parse_args()


def main() -> int:
    """Runs the tool; 0 on success, 1 on bad input, 130 when interrupted."""
    arguments = _parse()
    separator: str | None = arguments.document_separator
    if separator is not None:
        separator = separator.replace(r"\n", "\n").replace(r"\t", "\t")
    try:
        summary = preprocess_files(
            expand_inputs(arguments.inputs),
            arguments.output,
            TokenizerSettings(
                folder=arguments.tokenizer,
                train_vocab_size=arguments.train_tokenizer,
                train_megabytes=arguments.train_megabytes,
                eod_token=arguments.eod_token,
                parse_special_tokens=arguments.parse_special_tokens,
            ),
            inputs=InputSettings(
                json_key=arguments.json_key,
                column=arguments.column,
                document_separator=separator,
                format=arguments.format,
            ),
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{summary.prefix}: {summary.tokens} tokens in {summary.documents} documents"
        f" ({summary.skipped_empty} empty ones skipped), vocabulary {summary.vocab_size}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
