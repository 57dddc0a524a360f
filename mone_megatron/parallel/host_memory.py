"""Keeps the memory that tensors on CPU let go, and asks for huge pages, where glibc allocates.

glibc gives large tensors back to the system when they are freed, so that a training step takes
thousands of page faults for memory that the step before had; and pages of 4 KiB cost a processor
many look-ups of addresses, which huge ones (2 MiB) do not.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import resource
import sys

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1
# By how much the heap grows at least.
_GROWTH = 64 * 2**20
# Addresses, not memory: what is never used takes none.
_HUGE_PAGES_FOR = 2**30


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory, in huge pages where the system has them for the asking.

    It may be called again. What the heap holds already stays as it is, so call it early.

    Returns:
        Whether the C library is glibc, which can.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    for parameter, value in (
        (_MMAP_THRESHOLD, _MOST), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, _GROWTH),
    ):  # fmt: skip
        libc.mallopt(parameter, value)
    if _addresses_are_free():
        _ask_for_huge_pages(libc)
    return True


def _addresses_are_free() -> bool:
    """Returns whether this process may take addresses that it does not use."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return all(limit == resource.RLIM_INFINITY for limit in limits)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Marks the addresses into which the heap grows next.

    They are taken once, marked, and freed: the heap keeps them, without memory behind them.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    taken = libc.malloc(_HUGE_PAGES_FOR)
    if taken is None:  # the system counts addresses as memory: nothing is lost but speed
        return
    first = -(-taken // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (taken + _HUGE_PAGES_FOR - first) // mmap.PAGESIZE * mmap.PAGESIZE
    libc.madvise(first, whole, mmap.MADV_HUGEPAGE)
    libc.free(taken)
