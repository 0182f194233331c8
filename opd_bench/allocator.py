"""The C library's allocator, told to keep what is freed, up to a limit.

By default glibc gives large blocks back at once, and every step asks for the same ones again: pages that the kernel must map and clear.
What that saves a step of SmolLM2-135M is in benchmarks/README.md. But blocks of ever other sizes scatter what is free, and a process
that kept all of it would grow from batch to batch, so a thread looks every second, and gives it back where it has become too much.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as in malloc.h
NEVER = 2**31 - 1
KEPT = 2 * 2**30  # bytes
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Info(ctypes.Structure):
    """What ``mallinfo2`` says; bytes in use are ``uordblks`` of the heaps and ``hblkhd`` in mappings of their own."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def keep_freed_memory(most: int = KEPT) -> None:
    """For the whole process, ``most`` bytes of it. Without effect where the C library has no such setting."""
    library = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(library, "mallinfo2"):
        return
    library.mallopt(MMAP_THRESHOLD, 2**30)
    library.mallopt(TRIM_THRESHOLD, NEVER)

    def watch() -> None:
        while True:
            give_back(most)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="allocator").start()


def give_back(most: int) -> None:
    """Everything that is free, if it is more than ``most`` bytes."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Info
    info = library.mallinfo2()
    if resident() - info.uordblks - info.hblkhd > most:
        library.malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
