"""Write what the documentation says about the configuration's keys, from the schema."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.config.reference import json_schema, write_tables
from mone_megatron.display import harmless

_DOCS = Path(__file__).resolve().parents[1] / "docs"

_DESCRIPTION = """\
Write the tables of keys in docs/configuration.md and the JSON Schema docs/config.schema.json from
the schema of the configuration (mone_megatron/config). Run it after a change of a key."""


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when the files say what the schema says, 2 otherwise."""
    parser = Parser(description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is old")
    parser.add_argument("--docs", type=Path, default=_DOCS, help="the folder of the documentation")
    return exit_status(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    page = options.docs / "configuration.md"
    files = {
        page: write_tables(page.read_text(encoding="utf-8")),
        options.docs / "config.schema.json": json_schema(),
    }
    for path, text in files.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            raise ValueError(
                f"{path}: not what the schema says; run python tools/config_reference.py"
            )
        path.write_text(text, encoding="utf-8")
        say(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
