"""The compiled passes read and write nothing beyond their tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mone_megatron.testing.launch import REPOSITORY, import_path

SANITIZERS = ("libasan.so", "libubsan.so")
TESTS = (
    "tests/kernels/test_compiled_cpu.py", "tests/kernels/test_attention_cpu.py",
    "tests/kernels/test_lean_cpu.py", "tests/kernels/test_topk_cpu.py",
    "tests/kernels/test_grouped_product.py", "tests/kernels/test_experts_cpu.py",
    "tests/mone/test_local_dispatch.py",
)  # fmt: skip


def sanitizers() -> list[str]:
    """Returns gcc's libraries; a compiler that has none answers with the bare name."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in SANITIZERS
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("gcc has no sanitizers")
    return found


@pytest.mark.slow
def test_compiled_passes_stay_within_their_tensors(tmp_path: Path) -> None:
    log = tmp_path / "found"
    environment = os.environ | {
        "LD_PRELOAD": " ".join(sanitizers()),
        # Python and torch never give all back.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
        "PYTHONPATH": import_path(Path(__file__).parent, REPOSITORY),
        "OMP_NUM_THREADS": "2",
        "HOME": str(tmp_path),  # where they are kept once compiled
    }
    command = ["-m", "pytest", "-p", "sanitized", "-p", "no:cacheprovider", "-q", *TESTS]
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    found = "\n".join(path.read_text(errors="replace") for path in tmp_path.glob("found*"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + found[:4000]
    assert not found
