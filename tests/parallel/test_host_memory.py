"""Freed memory is kept, and lies in huge pages where the system has them for the asking."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def _said(prepare: str, code: str) -> int:
    """What a process of its own says, after its first tensors were made and freed."""
    whole = textwrap.dedent(f"""
        import re, resource
        import torch
        {prepare}
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def fill():
            for elements in (2**17, 2**20, 2**23):
                torch.empty(elements).fill_(1.0)
        for _ in range(20):  # what is freed may be too small, by little, for what comes next
            fill()
        {code}
    """)
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, check=True, timeout=300
    )
    return int(done.stdout)


_KEEP = "from mone_megatron.parallel.host_memory import keep_freed_memory; keep_freed_memory()"
_COUNT = "before = faults(); fill(); print(faults() - before)"


def test_tensors_take_the_memory_of_those_before() -> None:
    # 36 MiB, in pages of 4 KiB.
    assert _said("", _COUNT) > 1000, "glibc keeps it by itself: is this still needed?"
    assert _said(_KEEP, _COUNT) < 100
    assert _said(f"{_KEEP}; keep_freed_memory()", _COUNT) < 100


@pytest.mark.skipif(
    not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text(encoding="ascii"),
    reason="the kernel has no huge pages for processes",
)
def test_tensors_lie_in_huge_pages() -> None:
    code = (
        "kept = torch.ones(2**24); maps = open('/proc/self/smaps').read(); "
        "heap = maps.split('[heap]', 1)[1]; "
        # The heap is several mappings: that which was there before is not marked.
        "print(sum(int(kib) for kib in re.findall(r'AnonHugePages: +([0-9]+)', heap)[:3]))"
    )
    assert _said(_KEEP, code) > 32 * 1024


def test_a_process_with_a_limit_keeps_its_memory_all_the_same() -> None:
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (2**34, 2**34)); "
    assert _said(limit + _KEEP, _COUNT) < 100
