"""A plugin of pytest's (``-p sanitized``): the compiled passes, with every access checked.

gcc's address sanitizer must be loaded before Python (LD_PRELOAD): it then knows where each of
torch's tensors begins and ends.
"""

from __future__ import annotations

from pathlib import Path

from mone_megatron.kernels import compiled_cpu


def pytest_configure() -> None:
    """Compiles them so, and looks whether they are."""
    compiled_cpu._FLAGS = (
        *compiled_cpu._FLAGS, "-O1", "-g", "-fsanitize=address,undefined",
        # Registers are loaded from where rows begin, which processors allow.
        "-fno-sanitize=alignment",
    )  # fmt: skip
    made = compiled_cpu.compiled()
    assert made.library is not None, made.problem
    assert b"__asan_report_load" in Path(made.library._name).read_bytes()
