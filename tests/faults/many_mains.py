"""Command lines of mone_megatron.pretrain one after another in this process.

    python many_mains.py FOLDER/mains.json

The file holds ``jobs``, a list of objects with ``arguments`` and the ``environment`` to add, and
``watch``: whether to tell if a process group was opened, for which torch is imported first.
FOLDER/mains.ended.json tells how each ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mone_megatron.pretrain import main


@contextmanager
def watched_groups(watch: bool) -> Iterator[list[bool]]:
    """A list that gets an entry with each process group that is opened."""
    opened: list[bool] = []
    if not watch:
        yield opened
        return
    import torch.distributed as dist

    open_group = dist.init_process_group

    def watched(*args: Any, **options: Any) -> None:
        opened.append(True)
        open_group(*args, **options)

    dist.init_process_group = watched
    try:
        yield opened
    finally:
        dist.init_process_group = open_group


def run(arguments: list[str], said: Path, *, watch: bool) -> dict[str, Any]:
    with said.open("w") as stream, watched_groups(watch) as opened:
        os.dup2(stream.fileno(), 2)
        started = time.monotonic()
        try:
            code = main(arguments)
        except Exception:
            # As the interpreter would.
            traceback.print_exc()
            code = 1
        seconds = time.monotonic() - started
        sys.stderr.flush()
    return {
        "code": code,
        "said": said.read_text(encoding="utf-8"),
        "opened": bool(opened),
        "torch": "torch" in sys.modules,
        "seconds": seconds,
    }


def mains(listed: Path) -> None:
    work = json.loads(listed.read_text(encoding="utf-8"))
    ended = []
    for number, job in enumerate(work["jobs"]):
        before = dict(os.environ)
        os.environ.update(job["environment"])
        said = listed.with_name(f"mains.{number}.said")
        ended.append(run(job["arguments"], said, watch=work["watch"]))
        os.environ.clear()
        os.environ.update(before)
    listed.with_suffix(".ended.json").write_text(json.dumps(ended), encoding="utf-8")


if __name__ == "__main__":
    mains(Path(sys.argv[1]))
