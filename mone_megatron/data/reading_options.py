"""Holds the options of command lines that read documents. It imports nothing that takes time."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mone_megatron.data.escapes import unescape

if TYPE_CHECKING:
    from mone_megatron.data.documents import InputSettings
    from mone_megatron.data.text_keys import TextKeys


def add_reading(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Adds those that all of them share; each names the text's key and column in its own way."""
    group.add_argument(
        "--format",
        choices=("jsonl", "text", "parquet", "arrow"),
        help="the format of every file of text (default: by extension)",
    )
    group.add_argument(
        "--encoding",
        default="utf-8",
        metavar="NAME",
        help="of JSON lines and plain text, as Python names it: cp1252, utf-16, gb18030 "
        "(%(default)s)",
    )
    group.add_argument(
        "--document-separator",
        metavar="TEXT",
        help=r"splits plain text files into documents; \n, \t, \r, \\, \0, \xHH, \uXXXX and their "
        "like are understood",
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a bad record ends the reading, or is left out and counted (%(default)s)",
    )


def check_reading_used(options: argparse.Namespace, *, reads_files: bool) -> None:
    """Checks that the options of :func:`add_reading` that are given have something to act on.

    Args:
        options: the parsed command line.
        reads_files: whether one of the corpora is a file of text.

    Raises:
        ValueError: naming the first that does nothing.
    """
    if reads_files:
        return
    given = {
        "--format": options.format is not None,
        "--encoding": options.encoding != "utf-8",
        "--document-separator": options.document_separator is not None,
        "--on-error": options.on_error != "stop",
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name}: says how files of text are read, and none is; leave it out")


def reading_settings(
    options: argparse.Namespace,
    *,
    json_key: str | TextKeys,
    column: str | TextKeys,
    domain: str | None = None,
) -> InputSettings:
    """Returns the settings that the options of :func:`add_reading` ask for.

    Args:
        options: the parsed command line.
        json_key: the key of the text in JSON lines.
        column: the column of the text in Parquet and Arrow.
        domain: key or column of each record's domain; None for none.

    Raises:
        ValueError: the separator is empty, or holds an escape that is none; or the encoding is
            none.
    """
    # pyarrow, which readers need, takes a moment.
    from mone_megatron.data.documents import InputSettings

    separator: str | None = options.document_separator
    if separator is not None:
        try:
            separator = unescape(separator)
        except ValueError as error:
            raise ValueError(f"--document-separator: {error}") from None
    return InputSettings(
        json_key=json_key,
        column=column,
        encoding=options.encoding,
        document_separator=separator,
        format=options.format,
        on_error=options.on_error,
        domain=domain,
    )
