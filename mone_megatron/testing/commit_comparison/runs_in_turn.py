"""Runs ``python -m mone_megatron.pretrain`` several times in one process: imports cost most.

    python runs_in_turn.py JOBS.json

It imports nothing of the version that it drives but that entry point, as the command line does.
JOBS.json lists objects with ``arguments`` and ``port`` (a fresh rendezvous for each run; the other
variables of torchrun are set by who starts this). The first run that fails ends it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path


def main() -> int:
    """Runs all jobs and returns the exit code of the first that fails."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        arguments, sys.argv[1:] = sys.argv[1:], job["arguments"]
        code: object = 0
        try:
            runpy.run_module("mone_megatron.pretrain", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv[1:] = arguments
        if code:
            return code if isinstance(code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
