"""GPU tests run in a process that finds torch.cuda as it is, and no other tests do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mone_megatron.parallel.device import Device, connects_at_once
from mone_megatron.parallel.megatron_compat.cuda_names import CUDA_REDIRECTIONS
from mone_megatron.parallel.world import World

TESTS = Path(__file__).parents[1]
# What a process of pytest would run, and with what.
COLLECT = """
import json, sys, pytest, torch, triton

class Look:
    def pytest_collection_finish(self, session):
        marked = [item.get_closest_marker("gpu") is not None for item in session.items]
        found = {"marked": marked, "interpreted": triton.knobs.runtime.interpret}
        found["cuda"] = torch.cuda.current_device.__module__
        print("FOUND", json.dumps(found))

sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]], [Look()]))
"""


def _collect(*arguments: str) -> dict[str, object]:
    pytest.importorskip("triton", reason="Triton is not installed")
    # What a worker of pytest-xdist has of its own is not its child's, a pytest by itself.
    inherited = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *arguments, str(TESTS / "kernels/test_triton.py")],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found: dict[str, object] = json.loads(line.removeprefix("FOUND"))
    return found


def test_with_the_option_there_is_no_cpu_backend() -> None:
    found = _collect("--gpu")
    assert found["cuda"] == "torch.cuda"
    assert not found["interpreted"]
    assert found["marked"]
    assert all(found["marked"])  # type: ignore[arg-type]


def test_without_it_there_is() -> None:
    found = _collect()
    assert found["cuda"] == CUDA_REDIRECTIONS["current_device"].__module__
    assert found["interpreted"]
    assert not all(found["marked"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "size", "local_size", "at_once"),
    [("cuda", 8, 8, True), ("cuda", 1, 1, True), ("cuda", 16, 8, False), ("cpu", 2, 2, False)],
)
def test_groups_connect_at_once_on_one_machine(
    kind: str, size: int, local_size: int, at_once: bool
) -> None:
    device = Device(kind, torch.device(kind), torch.bfloat16, 1, "")
    assert connects_at_once(device, World(0, size, 0, local_size)) is at_once
