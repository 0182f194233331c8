"""Where time and memory go: the code marks its parts, and whoever listens hears what each of them took.

    with clock.recording() as clock:
        with part("decode"):            # in the code that works
            ...
    clock.take()["decode"].seconds

Parts may lie within each other: every moment belongs to the innermost. Nobody listens by default, and a mark then costs one look at a
variable; so mark stretches of work, never single tokens. Only the thread that listens is heard.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

STATM = Path("/proc/self/statm")
SAMPLE_S = 0.005  # between two looks at the resident memory
_UNHEARD = nullcontext()
_listener: Clock | None = None


def part(name: str, *, when: bool = True, owner: bool = False) -> AbstractContextManager[None]:
    """What runs in the block is the part ``name``. The parts within an ``owner`` are its own: "judge, decode". ``when`` False: no part."""
    if _listener is None or not when or threading.get_ident() != _listener.thread:
        return _UNHEARD
    return _listener.part(name, owner)


def settled(device: torch.device) -> float:
    """`time.perf_counter` once all that was queued on ``device``, in this stream, is done: a GPU is asked and goes on by itself."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


@dataclass
class Heard:
    """What a part came to. Bytes are those of the whole process; on an accelerator, those that torch has allocated there."""

    calls: int = 0
    seconds: float = 0.0
    peak: int = 0  # bytes, the most there were while it ran
    growth: int = 0  # bytes, the most that came on top of what there was when a call began


class Memory(Protocol):
    def peak(self) -> int:
        """The most bytes since this was last asked."""
        ...

    def now(self) -> int: ...


class Clock:
    """Adds up what `part` marks. ``settle`` waits for work that was only queued."""

    def __init__(self, memory: Memory, now: Callable[[], float] = time.perf_counter, settle: Callable[[], None] = lambda: None) -> None:
        self._memory, self._now, self._settle = memory, now, settle
        self._open: list[tuple[str, int]] = []  # the parts under way and the bytes at their beginning, the innermost last
        self._owners: list[str] = []
        self._heard: dict[str, Heard] = {}
        self._since = 0.0
        self.thread = threading.get_ident()

    def take(self) -> dict[str, Heard]:
        """What was heard, by name of part, in order of first appearance; listening begins anew."""
        heard, self._heard = self._heard, {}
        return heard

    @contextmanager
    def part(self, name: str, owner: bool) -> Iterator[None]:
        name = ", ".join([*self._owners, name])
        self._border()
        self._heard.setdefault(name, Heard()).calls += 1
        self._open.append((name, self._memory.now()))
        self._owners += [name] * owner
        try:
            yield
        finally:
            self._border()
            self._open.pop()
            del self._owners[len(self._owners) - owner :]

    def _border(self) -> None:
        """Whatever has happened since the last border is the innermost part's."""
        self._settle()
        now, peak = self._now(), self._memory.peak()
        if self._open:
            name, before = self._open[-1]
            heard = self._heard.setdefault(name, Heard())
            heard.seconds += now - self._since
            heard.peak, heard.growth = max(heard.peak, peak), max(heard.growth, peak - before)
        self._since = now


@contextmanager
def recording(device: torch.device | None = None) -> Iterator[Clock]:
    """A clock that hears every part in the block; ``device`` is where the models are, by default the CPU."""
    global _listener
    if device is not None and device.type == "cuda":
        listening, settle = nullcontext(_Allocated(device)), lambda: torch.cuda.synchronize(device)
    else:
        listening, settle = _resident(), lambda: None
    with listening as memory:
        before, _listener = _listener, Clock(memory, settle=settle)
        try:
            yield _listener
        finally:
            _listener = before


class _Allocated:
    """On a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self) -> int:
        most = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return most

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)


class _Resident:
    """Of this process: a thread looks every few milliseconds, and so does whoever asks."""

    def __init__(self) -> None:
        self._most = self.now()

    def look(self) -> None:
        self._most = max(self._most, self.now())

    def peak(self) -> int:
        now = self.now()
        most, self._most = max(self._most, now), now
        return most

    def now(self) -> int:
        return resident()


@contextmanager
def _resident() -> Iterator[_Resident]:
    memory, ended = _Resident(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            memory.look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join()


def resident() -> int:
    """Bytes of memory that this process holds; where the system does not say so (it is no Linux), the most it ever held."""
    import resource

    if sys.platform == "linux":
        return int(STATM.read_bytes().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
