"""Run generated programs against hidden tests, outside this process and behind walls.

    >>> run_tests("def f(a):\n    return sum(a)", ["assert f([1, 2]) == 3"])
    Outcome(passed=True, status='passed', detail='')

A pool of warm workers (`opd_bench.sandbox_worker`) forks one child per program: own namespaces, a private read-only root,
Landlock, no capabilities, no network, no processes or threads, limits on time, memory and files, an empty directory, no
environment and no file descriptors of ours. Where the kernel refuses that, bubblewrap builds the walls, one worker per program.

A program cannot report its own success: it is sent the calls only, never the expected values, and we compare the text of the
values it sends back (exact types and values, see `sandbox_worker.encode`). Exiting early, printing,
patching builtins, overloading ``__eq__`` or writing to the result pipe can thus only make it fail. The files, processes and
memory of one program are gone before the next.

Not protected from: a program that guesses or computes the right values some other way (it sees the arguments of all
calls at once), holes in the kernel, a program that heats the CPU until its time is up, timing as a covert channel, and
anything at all in unsafe mode beyond the resource limits. Linux on x86-64 and ARM64 only.
"""

from __future__ import annotations

import ast
import atexit
import functools
import hashlib
import json
import os
import select
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from opd_bench import sandbox_worker
from opd_bench.errors import RunError, UserError

CONSENT = "OPD_BENCH_UNSAFE_CODE"
UNSAFE = "none (unsafe)"
WORKERS = os.cpu_count() or 1
START_S = 20.0
GRACE_S = 20.0
DETAIL = 160


@dataclass(frozen=True)
class Outcome:
    """``status`` is passed, failed, error, timeout, memory or killed; ``detail`` one short line."""

    passed: bool
    status: str
    detail: str = ""


class _RefusedError(Exception):
    """This machine does not let us isolate this way."""


def _ready(pipes: Iterable[int], timeout_s: float) -> list[int]:
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
    return [pipe for pipe, _ in poll.poll(timeout_s * 1000)]


def _bubblewrap() -> list[str]:
    worker, python = "/worker.py", os.path.realpath(sys.executable)
    views = [part for folder in sandbox_worker.readable() for part in ("--ro-bind", folder, folder)]
    masks = [part for folder in sandbox_worker.masked() for part in ("--tmpfs", folder, "--remount-ro", folder)]
    walls = [
        "--unshare-all",
        "--unshare-user",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    box = ["--dev", "/dev", "--size", str(8 << 20), "--tmpfs", sandbox_worker.BOX, "--chdir", sandbox_worker.BOX]
    files = ["--ro-bind", python, python, "--ro-bind", sandbox_worker.__file__, worker]
    return ["bwrap", *walls, *views, *masks, *files, *box, "--remount-ro", "/", python, "-P", "-s", "-S", worker, "bubblewrap"]


class _Worker:
    """A running worker and its two pipes; raises `_RefusedError` where it cannot build its walls."""

    def __init__(self, kind: str) -> None:
        self.reusable = kind != "bubblewrap"
        as_user = {}
        if kind == "bubblewrap":
            command = _bubblewrap()
            if os.geteuid() == 0:
                as_user = {"user": sandbox_worker.NOBODY, "group": sandbox_worker.NOBODY, "extra_groups": []}
        else:
            command = [sys.executable, "-P", "-s", "-S", sandbox_worker.__file__, "unsafe" if kind == UNSAFE else kind]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
                **as_user,
            )
        except OSError as error:
            raise _RefusedError(f"{kind}: {error}") from None
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        _workers.add(self)
        greeting = self.receive() if _ready([self.replies.fileno()], START_S) else {}
        if "ready" not in greeting:
            self.close()
            raise _RefusedError(f"{kind}: {greeting.get('error', 'the worker does not start')}")

    def send(self, request: dict) -> None:
        with suppress(BrokenPipeError):  # a dead worker shows when we receive
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()

    def receive(self) -> dict:
        """The next reply, empty if the worker died."""
        line = self.replies.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def close(self) -> None:
        """Hang up, upon which the worker stops its program and leaves."""
        _workers.discard(self)
        for pipe in (self.requests, self.replies):
            with suppress(OSError):
                pipe.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()
_idle: list[_Worker] = []
_outcomes: dict[bytes, Outcome] = {}


@atexit.register
def close() -> None:
    """Stop the idle workers; the next program starts new ones."""
    while _idle:
        _idle.pop().close()


def _forget() -> None:
    """After a fork of ours: the workers belong to the parent, and must still see it hang up."""
    null = os.open(os.devnull, os.O_RDWR)
    for worker in list(_workers):
        for pipe in (worker.requests, worker.replies):
            os.dup2(null, pipe.fileno(), inheritable=False)
    os.close(null)
    _idle.clear()


os.register_at_fork(after_in_child=_forget)


@functools.cache
def isolation() -> str:
    """How generated code is walled in here, found by trying: ``landlock``, ``bubblewrap`` or, with consent only, ``none (unsafe)``.

    Raises:
        UserError: nothing works here and unsafe mode was not asked for.
    """
    refusals = []
    for kind in ("landlock", "bubblewrap", *([UNSAFE] if os.environ.get(CONSENT) == "1" else [])):
        try:
            worker = _Worker(kind)
        except _RefusedError as refusal:
            refusals.append(str(refusal))
            continue
        worker.send({"program": "def f():\n    return 1", "calls": ["f()"], "timeout_s": START_S, "memory_mb": 256})
        reply = worker.receive()
        if reply == {"end": "exit", "text": "=1\n"}:
            _idle.append(worker) if worker.reusable else worker.close()
            return kind
        worker.close()
        refusals.append(f"{kind}: {reply.get('text', '').strip() or 'a trial program did not run'}")
    raise UserError(
        f"generated code cannot be isolated on this machine ({'; '.join(refusals)}): enable unprivileged user namespaces with Landlock, "
        "install bubblewrap, or accept the risk with --unsafe-code"
    )


@functools.lru_cache(10_000)
def _split(test: str) -> tuple[str, str]:
    """The call and the encoded expected value of ``assert CALL == LITERAL``."""
    try:
        match ast.parse(test.strip()).body:
            case [ast.Assert(test=ast.Compare(left=call, ops=[ast.Eq()], comparators=[expected]))]:
                return ast.unparse(call), sandbox_worker.encode(ast.literal_eval(expected))
    except (SyntaxError, ValueError):
        pass
    raise UserError(f"test {test!r} is not of the form 'assert f(arguments) == literal'")


def _line(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= DETAIL else text[: DETAIL - 3] + "..."


def _judge(reply: dict, tests: Sequence[tuple[str, str]], timeout_s: float, memory_mb: int) -> Outcome:
    end, lines = reply["end"], reply["text"].split("\n")
    if end == "timeout":
        return Outcome(False, "timeout", f"no answer within {timeout_s:g} s of CPU time")
    if end == "flood":
        return Outcome(False, "error", "the returned values are too large")
    for (call, expected), line in zip(tests, lines, strict=False):
        if line == f"={expected}":
            continue
        if line.startswith("="):
            return Outcome(False, "failed", _line(f"{call} gave {line[1:]}, not {expected}"))
        if line.startswith(("!memory", "!MemoryError")):
            return Outcome(False, "memory", f"more than {memory_mb} MB")
        if line.startswith("!"):
            return Outcome(False, "error", _line(line[1:]))
        break
    else:
        if end == "exit" and len(lines) == len(tests) + 1:
            return Outcome(True, "passed")
    return Outcome(False, "killed", f"ended by {end}") if end != "exit" else Outcome(False, "error", "exited before its tests ended")


def _borrow(kind: str) -> _Worker:
    with suppress(IndexError):
        return _idle.pop()
    try:
        return _Worker(kind)
    except _RefusedError as refusal:
        raise RunError(f"a sandbox worker that could start before cannot now ({refusal})") from None


def run_many(jobs: Sequence[tuple[str, Sequence[str]]], timeout_s: float = 2.0, memory_mb: int = 256) -> list[Outcome]:
    """The outcome of each ``(program, tests)``, in order; several workers run at once, identical jobs run once.

    A test reads ``assert f(arguments) == literal``. A program with all its tests may take ``timeout_s`` seconds of CPU time, so
    that a busy machine changes no outcome, and five times that by the clock; ``memory_mb`` MiB limit its address space.

    Raises:
        UserError: no isolation on this machine, a test of another form, or a program without tests.
        RunError: no worker starts any more.
    """
    if any(not tests for _, tests in jobs):
        raise UserError("a program needs at least one test to be judged")
    kind = isolation()
    keys = [hashlib.sha256(repr((program, list(tests), timeout_s, memory_mb)).encode()).digest() for program, tests in jobs]
    todo = {
        key: (program, [_split(test) for test in tests]) for key, (program, tests) in zip(keys, jobs, strict=True) if key not in _outcomes
    }
    waiting, died = deque(todo), set()
    busy: dict[int, tuple[_Worker, bytes]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < WORKERS:
                worker, key = _borrow(kind), waiting.popleft()
                busy[worker.replies.fileno()] = worker, key
                program, tests = todo[key]
                worker.send({"program": program, "calls": [call for call, _ in tests], "timeout_s": timeout_s, "memory_mb": memory_mb})
            ready = _ready(busy, sandbox_worker.WALL * timeout_s + GRACE_S)
            for pipe in ready or list(busy):  # nobody answers: all of them hang
                worker, key = busy[pipe]
                reply = worker.receive() if ready else {}
                del busy[pipe]
                if reply and worker.reusable:
                    _idle.append(worker)
                else:
                    worker.close()
                if reply:
                    _outcomes[key] = _judge(reply, todo[key][1], timeout_s, memory_mb)
                elif key in died:
                    _outcomes[key] = Outcome(False, "killed", "its worker died twice")
                else:
                    died.add(key)
                    waiting.append(key)
    finally:
        for worker, _ in busy.values():
            worker.close()
    return [_outcomes[key] for key in keys]


def run_tests(program: str, tests: Sequence[str], timeout_s: float = 2.0, memory_mb: int = 256) -> Outcome:
    """The outcome of one program; see `run_many`."""
    return run_many([(program, tests)], timeout_s, memory_mb)[0]
