"""Starts the fuzzer's processes, on request, in the environment of its own interpreter.

    python -m mone_megatron.testing.fuzz.server

It reads a JSON object a line, trains or checks in warm processes, one a rank, and answers each by a
line: the exit codes. One such process runs for each release of megatron-core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mone_megatron.testing.launch import REPOSITORY, rank_variables, wait_for_all
from mone_megatron.testing.ports import free_ports
from mone_megatron.testing.warm_start import WarmProcess, warm_context

_WARM = "mone_megatron.testing.fuzz.warm"
_IMPORTS = "mone_megatron.testing.warm_imports"
# A run takes some seconds; a machine may have ten times as much to do as cores.
_SECONDS = 600.0


class Server:
    """Is one such process, seen from the fuzzer. It is a context manager."""

    def __init__(self, python: Path) -> None:
        """Starts it; what it runs is warm after the first request."""
        self._process = subprocess.Popen(
            [str(python), "-m", "mone_megatron.testing.fuzz.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, module: str, job: object, folder: Path, *, ranks: int = 1) -> list[Any]:
        """Runs ``python -m module JOB.json`` on so many ranks.

        Args:
            module: what is run.
            job: what its JOB.json says.
            folder: for the file, and for what each rank says: ``RANKS-NUMBER.log``.
            ranks: how many processes.

        Returns:
            The exit code of each; None for one that did not end in time, or because of another.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{module.rpartition('.')[2]}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        asked = {"module": module, "job": str(path), "folder": str(folder), "ranks": ranks}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that starts the fuzzer's ended; see what it said above")
        codes: list[Any] = json.loads(answer)
        return codes


def _answer(asked: dict[str, Any]) -> list[int | None]:
    ranks = int(asked["ranks"])
    port = str(free_ports(1)[0])
    workers = []
    for rank in range(ranks):
        log = Path(asked["folder"], f"{ranks}-{rank}.log")
        environment = os.environ | rank_variables(rank, ranks) | {"MASTER_PORT": port}
        workers.append(
            WarmProcess(
                ["-m", asked["module"], asked["job"]],
                environment=environment,
                folder=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        )
    return wait_for_all(workers, _SECONDS)


def main() -> int:
    """Answers until standard input ends."""
    # Before the first process: the fork server imports this once.
    warm_context().set_forkserver_preload([_IMPORTS, _WARM])
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
