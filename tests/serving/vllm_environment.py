"""The environment that has vLLM: `make test-vllm` makes it, and processes in it run from here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".cache" / "vllm" / "bin" / "python"
_HERE = Path(__file__).parent


def variables(**changes: str) -> dict[str, str]:
    """Environment variables that keep vLLM on this machine, small and quiet."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_DO_NOT_TRACK": "1",
        **changes,
    }


def run(script: str, *arguments: str, timeout: float = 1200, **changes: str) -> str:
    """Runs a script of this folder there, and returns what it prints.

    Raises:
        AssertionError: it failed; with the end of its output.
    """
    result = subprocess.run(
        [str(PYTHON), str(_HERE / script), *arguments],
        env=variables(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def generate(
    jobs: Sequence[Mapping[str, Any]], folder: Path, **changes: str
) -> dict[str, dict[str, Any]]:
    """Runs jobs of generate_with_vllm.py in one process and returns what each gave, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, given = folder / "jobs.json", folder / "results.json"
    asked.write_text(json.dumps(list(jobs)), encoding="utf-8")
    run("generate_with_vllm.py", str(asked), str(given), **changes)
    results: dict[str, dict[str, Any]] = json.loads(given.read_text(encoding="utf-8"))
    return results
