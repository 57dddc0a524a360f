"""Command lines of mone_megatron.pretrain one after another in this process.

    python many_mains.py FOLDER/mains.json

The file lists lists of arguments. FOLDER/mains.ended.json tells how each ended: exit code, stderr,
whether a process group was opened, and seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mone_megatron.pretrain import main


def run(arguments: list[str], said: Path) -> dict[str, Any]:
    opened = False
    open_group = dist.init_process_group

    def watched(*args: Any, **options: Any) -> None:
        nonlocal opened
        opened = True
        open_group(*args, **options)

    dist.init_process_group = watched
    started = time.monotonic()
    with said.open("w") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            code = main(arguments)
        except Exception:
            # As the interpreter would.
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            dist.init_process_group = open_group
    seconds = time.monotonic() - started
    return {
        "code": code,
        "said": said.read_text(encoding="utf-8"),
        "opened": opened,
        "seconds": seconds,
    }


def mains(listed: Path) -> None:
    ended = [
        run(arguments, listed.with_name(f"mains.{number}.said"))
        for number, arguments in enumerate(json.loads(listed.read_text(encoding="utf-8")))
    ]
    listed.with_suffix(".ended.json").write_text(json.dumps(ended), encoding="utf-8")


if __name__ == "__main__":
    mains(Path(sys.argv[1]))
