"""Serves a run or an export with vLLM's OpenAI server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mone_megatron.command_line import Parser, exit_status, say
from mone_megatron.display import harmless

_DESCRIPTION = """\
Serve a model with vLLM, on this machine, in OpenAI's protocol. The model is a run (its newest
checkpoint), a checkpoint, or an export; a run is exported first, into RUN/exports, once for each
checkpoint. What is wrong with the model or the options is said first, then whether vLLM is there,
and for MoNE the plugin beside it (serving/vllm): all of it before anything is written. What was
chosen is said, with lines to try it; then this process becomes the server."""

_EPILOG = """\
Options after -- go to vLLM as they are.

exit status: 2 refused; otherwise the server's

examples:
  mone serve runs/quickstart/mone
  mone serve exports/mone --port 8001 --dtype fp32 -- --tensor-parallel-size 2"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="RUN_OR_EXPORT", help="what to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="to listen at (8000)")
    parser.add_argument("--name", help="the model's name for clients (the folder's)")
    parser.add_argument(
        "--dtype",
        choices=("saved", "fp32", "bf16", "fp16"),
        default="saved",
        help="of weights and activations (the export's)",
    )
    parser.add_argument(
        "--vllm-python",
        type=Path,
        metavar="FILE",
        help="the Python that has vLLM (this one, else the one of make test-vllm)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and end")
    return parser


def _serve(options: argparse.Namespace, for_vllm: Sequence[str]) -> None:
    from mone_megatron.serving.engine import find_vllm
    from mone_megatron.serving.server import check_address, find_model, ready_folder, server_of

    # What is wrong with the request comes before what is not installed.
    check_address(options.port)
    model = find_model(options.model, say=say)
    engine = find_vllm(options.vllm_python)
    folder = ready_folder(model, engine, dry_run=options.dry_run, say=say)
    server = server_of(
        folder,
        engine,
        host=options.host,
        port=options.port,
        name=options.name,
        dtype=options.dtype,
        options=for_vllm,
    )
    for line in server.describe():
        say(line)
    if not options.dry_run:
        os.execve(server.command[0], server.command, server.environment)


@harmless
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status, if it does not become the server."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    place = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:place])
    return exit_status(lambda options: _serve(options, given[place + 1 :]), options)
