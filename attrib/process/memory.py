"""Keeping memory between tensors on the CPU.

glibc gives every large block back to the kernel when it is freed, and fetches it again, page by
page, for the next tensor. For a net on the CPU that can cost more than its arithmetic (measured:
3.5 times, docs/performance.md). GPU memory is not concerned: torch keeps it itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation. False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(option, value) for option, value in settings)


def give_back() -> None:
    """Give the kernel what was freed but kept for the next allocation."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing was kept
            ctypes.CDLL("libc.so.6").malloc_trim(0)


NOTABLE = 128 * 2**20  # bytes

_left = 0  # what the process occupied after the last ``begin_small``


def begin_small() -> None:
    """Before something whose memory is measured: what was freed since the last time is given back, if it is notable.

    A large process takes seconds to look for it.
    """
    global _left
    if resident() < _left + NOTABLE:
        return
    gc.collect()
    give_back()
    _left = resident()


def resident() -> int:
    """Bytes of memory that this process occupies now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class Heap:
    """Gives freed memory back now and then: kept blocks of ever other sizes leave gaps between them that nothing fits.

    ``tidy`` does so when the process has grown to twice what it was after the last time, and a GiB more, so
    that it costs little.
    """

    def __init__(self) -> None:
        self._after = resident()

    def tidy(self) -> None:
        if resident() < 2 * self._after + 2**30:
            return
        give_back()
        self._after = resident()
