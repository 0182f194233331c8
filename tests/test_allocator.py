"""Freed memory is kept for the next step, and given back where it has become too much."""

import subprocess
import sys

import pytest

FREED = """
import threading

import torch
from opd_bench.allocator import give_back, keep_freed_memory, resident

keep_freed_memory(2**50)
assert "allocator" in [thread.name for thread in threading.enumerate()]
before = resident()
blocks = [torch.ones(2**20) for _ in range(200)]  # 4 MiB each
between = torch.ones(100)
del blocks
kept = resident()
give_back(2**50)
still = resident()
give_back(2**28)
print(*(size - before for size in (kept, still, resident())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_freed_is_kept_up_to_a_limit():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    kept, still, after = map(int, done.stdout.split())
    assert kept > 700 * 2**20
    assert still > 700 * 2**20
    assert after < 100 * 2**20
