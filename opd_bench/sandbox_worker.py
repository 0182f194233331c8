"""The process that runs generated programs for `opd_bench.sandbox`, one forked child per program.

    python -P -s -S sandbox_worker.py landlock    # also: bubblewrap, unsafe

It imports the standard library only and speaks JSON lines: first ``{"ready": true}`` or ``{"error": reason}``, then one
``{"end": "exit" | "timeout" | "flood" | "signal N", "text": lines}`` per request ``{"program", "calls", "timeout_s", "memory_mb"}``.
``text`` holds what the child sent and proves nothing: ``=encoding`` for each call's value, or ``!Kind: message``.

``landlock`` builds its own walls: user, mount, PID, network, IPC and UTS namespaces, a private root that holds nothing but
the standard library and the system's shared libraries, read-only, and a fresh tmpfs as working directory. The worker is PID 1
in there, which its children cannot signal. Each child gives up all capabilities and enters Landlock and a seccomp filter.
``bubblewrap`` is started inside such walls and serves one program only. ``unsafe`` has no walls, only the resource limits
and, where the kernel lets it, the seccomp filter: without that, a root that cannot become another user could fork.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import site
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

BOX = "/box"  # the program's working directory, the only place it can write
NOBODY = 65534
WALL = 5  # seconds of wall time per second of CPU time allowed
ANSWER_BYTES = 1 << 20
FILE_BYTES = 1 << 20
BOX_OPTIONS = "size=8m,nr_inodes=256,mode=700"
STANDARD_LIBRARY = os.path.dirname(os.__file__)

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/landlock.h>, <linux/seccomp.h>
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446  # alike on every machine
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8

# machine: (audit architecture, calls refused because they start processes, outlive the program, escape its memory limit or
# widen the kernel's surface): clone3 io_uring_setup memfd_secret shmget msgget semget mq_open add_key request_key keyctl
# unshare setns memfd_create bpf userfaultfd perf_event_open ptrace clone, and where they exist fork vfork
REFUSED = {
    "x86_64": (0xC000003E, (435, 425, 447, 29, 68, 64, 240, 248, 249, 250, 272, 308, 319, 321, 323, 298, 101, 56, 57, 58)),
    "aarch64": (0xC00000B7, (435, 425, 447, 194, 186, 190, 180, 217, 218, 219, 97, 268, 279, 280, 282, 241, 117, 220)),
}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """The result of a C call; raises OSError where it is negative."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(number: int, *arguments: int | bytes | None) -> int:
    return check(libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments))))


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    text = [None if part is None else part.encode() for part in (source, target, kind, options)]
    check(libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]))


def encode(value: object) -> str:
    """One-to-one text of plain data: equal texts mean the same types and values all the way down; -0.0 counts as 0.0.

    Anything but None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset or dict, subclasses included,
    becomes ``?type``, which no expected value encodes to.
    """
    kind = type(value)
    if kind is float:
        return ascii(value + 0.0)  # pyright: ignore[reportOperatorIssue]
    if value is None or kind in (bool, int, complex, str, bytes):
        return ascii(value)
    if kind is list:
        return f"[{', '.join(map(encode, value))}]"  # pyright: ignore[reportArgumentType]
    if kind is tuple:
        return f"({', '.join(map(encode, value))})"  # pyright: ignore[reportArgumentType]
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(map(encode, value)))})"  # pyright: ignore[reportArgumentType]
    if kind is dict:
        return f"{{{', '.join(sorted(f'{encode(k)}: {encode(v)}' for k, v in value.items()))}}}"  # pyright: ignore[reportAttributeAccessIssue]
    return f"?{kind.__name__}"


def readable() -> list[str]:
    """The directories Python needs to run: its standard library and the shared libraries."""
    folders = [STANDARD_LIBRARY, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [folder for folder in dict.fromkeys(sorted(folders, key=len)) if os.path.isdir(folder)]


def masked() -> list[str]:
    """Directories below the readable ones that programs have no business in: installed packages, ours perhaps among them."""
    return [folder for folder in site.getsitepackages([sys.base_prefix]) if os.path.isdir(folder)]


def leave_root() -> None:
    """Become an ordinary user for good, since limits on processes do not bind root."""
    if os.geteuid() == 0:
        with suppress(OSError):  # a root that is nobody outside its own user namespace cannot, and is bound anyway
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        check(libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))  # or /proc/self would still belong to root


def private_root() -> None:
    """Swap the root for an empty one with read-only views of `readable` and a mount point for the box."""
    sources = {folder: os.path.realpath(folder) for folder in readable()}
    empty = [folder for folder in masked() if any(folder.startswith(f"{parent}/") for parent in sources)]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    check(libc.pivot_root(b"/tmp", b"/tmp/old"))
    os.chdir("/")
    for folder, source in sources.items():
        if not os.path.isdir(folder):  # not already seen through a parent
            os.makedirs(folder)
            mount(f"/old{source}", folder, None, MS_BIND | MS_REC)
    for folder in empty:
        mount("tmpfs", folder, "tmpfs", 0, "size=4k")
    check(libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    os.mkdir(BOX)
    read_only_nosuid_nodev, recursive, here = struct.pack("4Q", 7, 0, 0, 0), 0x8000, -100
    syscall(SYS_MOUNT_SETATTR, here, b"/", recursive, read_only_nosuid_nodev, 32)


def enter_namespaces() -> None:
    """Put this process behind the walls, as PID 1 of its own; the process that was started stays outside to wait for it."""
    process = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)

    def unshare_user() -> None:
        uid, gid = os.geteuid(), os.getegid()
        check(libc.unshare(NEWUSER | NEWNS))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            file = os.open(name, os.O_WRONLY, dir_fd=process)
            os.write(file, text.encode())
            os.close(file)

    if os.geteuid() == 0:
        check(libc.unshare(NEWNS))  # as root still: the standard library may lie where only root can look
        private_root()
        leave_root()
        unshare_user()
    else:
        unshare_user()
        private_root()
    os.close(process)
    check(libc.unshare(NEWPID | NEWNET | NEWIPC | NEWUTS))
    worker = os.fork()
    if worker:
        os.close(0)
        os.close(1)
        os.waitpid(worker, 0)
        os._exit(0)
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def landlock_abi() -> int:
    """The kernel's Landlock version; raises OSError without Landlock."""
    return syscall(SYS_LANDLOCK_CREATE, None, 0, 1)


def restrict_files() -> None:
    """Landlock: read `readable`, read and write the box, execute nothing, no TCP, no signals or abstract sockets to the outside."""
    abi = landlock_abi()
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attributes = struct.pack("3Q", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = syscall(SYS_LANDLOCK_CREATE, attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    rules = {BOX: rights & ~EXECUTE} | {folder: READ_FILE | READ_DIR for folder in readable()}
    for folder, allowed in rules.items():
        parent = os.open(folder, os.O_PATH)
        syscall(SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, parent), 0)
        os.close(parent)
    syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def restrict_calls() -> None:
    """Seccomp: the calls of `REFUSED` fail with EPERM, foreign system-call conventions kill."""
    architecture, numbers = REFUSED[os.uname().machine]
    load, equal, at_least, give, refuse, kill = 0x20, 0x15, 0x35, 0x06, 0x50001, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0), (at_least, 0, 1, 0x40000000)]
    steps += [(give, 0, 0, kill), *(step for number in numbers for step in ((equal, 0, 1, number), (give, 0, 0, refuse)))]
    steps += [(give, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0))


def restrict(mode: str, request: dict) -> None:
    """Everything the forked child gives up before it runs the program."""
    cpu = int(request["timeout_s"]) + 1
    limits = {
        resource.RLIMIT_AS: request["memory_mb"] << 20,
        resource.RLIMIT_NPROC: 0,  # neither processes nor threads
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if mode == "landlock":
        check(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
        restrict_files()
    with suppress(OSError, KeyError) if mode == "unsafe" else nullcontext():
        restrict_calls()
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))


def run(program: str, calls: list[str], send: Callable[[bytes], object]) -> None:
    """Run ``program``, evaluate each of ``calls`` in its namespace and send one line per value, or one for what went wrong."""
    try:
        namespace = {"__name__": "program"}
        exec(compile(program, "<program>", "exec"), namespace)
        for call in calls:
            send(f"={encode(eval(call, namespace))}\n".encode())
    except MemoryError:
        send(b"!memory\n")
    except BaseException as error:
        send(f"!{type(error).__name__}: {ascii(str(error))[1:-1]}\n".encode())


def child(mode: str, box: str, request: dict, null: int, answer: int) -> NoReturn:
    """The forked process: drop the worker's files and privileges, then run the program."""
    leave, write = os._exit, os.write  # the program may replace them
    try:
        os.setsid()
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(answer, 3)
        os.closerange(4, 1024)
        os.chdir(box)
        restrict(mode, request)
        random.seed(0)  # a fork seeds anew
        run(request["program"], request["calls"], lambda line: write(3, line))
    except BaseException as error:
        write(3, f"!setup: {error!a}\n".encode())
    finally:
        leave(0)


def collect(program: int, answer: int, timeout_s: float) -> tuple[str, bytes]:
    """What the child sends, and ``exit`` if it closed its end, else why we stopped listening earlier."""
    poll, received, deadline = select.poll(), b"", time.monotonic() + WALL * timeout_s
    cpu_clock = ~program << 3 | 2  # clock_getcpuclockid(3)
    poll.register(answer, select.POLLIN)
    poll.register(0, 0)  # hangs up when the bench is gone
    while (left := min(timeout_s - time.clock_gettime(cpu_clock), deadline - time.monotonic())) > 0:
        ready = dict(poll.poll(left * 1000 + 1))
        if 0 in ready:
            raise SystemExit  # the program dies with us
        if ready:
            part = os.read(answer, 1 << 16)
            received += part
            if not part:
                return "exit", received
            if len(received) > ANSWER_BYTES:
                return "flood", b""
    return "timeout", received


def kill_all(program: int) -> int:
    """End the program and whatever it left behind; its wait status."""
    for kill, target in ((os.kill, program), (os.killpg, program), (os.kill, -1)):
        if target > 0 or os.getpid() == 1:
            with suppress(ProcessLookupError, PermissionError):
                kill(target, signal.SIGKILL)
    status = os.waitpid(program, 0)[1]
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return status


def answer_request(mode: str, box: str, null: int, request: dict) -> bytes:
    """Run one program and describe its end."""
    receive, send = os.pipe()
    program = os.fork()
    if program == 0:
        child(mode, box, request, null, send)
    os.close(send)
    end, received = collect(program, receive, request["timeout_s"])
    os.close(receive)
    status = kill_all(program)
    if end == "exit" and os.WIFSIGNALED(status):
        end = "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else f"signal {os.WTERMSIG(status)}"
    return json.dumps({"end": end, "text": received.decode("latin-1")}).encode() + b"\n"


@contextmanager
def fresh_box(mode: str) -> Iterator[str]:
    """An empty directory for one program."""
    if mode == "landlock":
        mount("tmpfs", BOX, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, BOX_OPTIONS)
        yield BOX
        check(libc.umount2(BOX.encode(), MNT_DETACH))
    elif mode == "bubblewrap":
        yield BOX
    else:
        box = tempfile.mkdtemp(prefix="opd-bench-")
        try:
            yield box
        finally:
            shutil.rmtree(box, ignore_errors=True)


def main(mode: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        if mode != "unsafe" and os.uname().machine not in REFUSED:
            raise OSError(f"no system-call filter for {os.uname().machine}")
        if mode == "landlock":
            landlock_abi()
            enter_namespaces()
        elif mode == "unsafe":
            leave_root()
    except (OSError, AttributeError) as error:
        os.write(1, json.dumps({"error": str(error)}).encode() + b"\n")
        return
    os.environ.clear()
    gc.collect()
    gc.freeze()
    os.write(1, b'{"ready": true}\n')
    while line := sys.stdin.buffer.readline():
        with fresh_box(mode) as box:
            answer = answer_request(mode, box, null, json.loads(line))
        os.write(1, answer)
        if mode == "bubblewrap":
            break


if __name__ == "__main__":
    main(sys.argv[1])
