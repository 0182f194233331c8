"""The C library's allocator, told to keep what is freed.

By default glibc gives large blocks back at once, and every step asks for the same ones again: pages that the kernel must map and clear.
What that saves a step of SmolLM2-135M is in benchmarks/README.md.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h
MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """For the whole process; without effect where the C library has no such setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, MOST)
