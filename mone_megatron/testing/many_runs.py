"""Trains several runs one after the other in the same processes: what tests of layouts launch.

    python -m mone_megatron.testing.many_runs JOBS.json

It needs torchrun's variables (see :mod:`.launch`). JOBS.json lists objects with ``overrides``
(Hydra) and ``port`` (a fresh rendezvous for each run).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from mone_megatron.config.load import compose
from mone_megatron.pretrain import pretrain


def main() -> int:
    """Runs all jobs and returns the exit code of the first that fails."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        os.environ["MASTER_PORT"] = str(job["port"])
        code = pretrain(compose(job["overrides"]))
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
