"""What generated programs can and cannot do. Every attack is bounded, so that it stays harmless where a wall is missing."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from opd_bench import sandbox
from opd_bench.errors import UserError
from opd_bench.resources import task_module
from opd_bench.sandbox_worker import encode

CHECKOUT = Path(__file__).parent.parent
NOBODY = 65534
GOOD = "def f(a):\n    return sum(a)"
ADDS = ["assert f([1, 2]) == 3", "assert f([]) == 0"]
DRIVER = """
import json, sys
from opd_bench import errors, sandbox
try:
    print(json.dumps(sandbox.isolation()), flush=True)
except errors.UserError as error:
    print(json.dumps({"refused": str(error)}), flush=True)
for line in sys.stdin:
    program, tests, limits = json.loads(line)
    outcome = sandbox.run_tests(program, tests, **limits)
    print(json.dumps([outcome.passed, outcome.status, outcome.detail]), flush=True)
"""

KERNEL_ALLOWS = """
import ctypes, os, sys
libc, uid = ctypes.CDLL(None), os.geteuid()
landlock = libc.syscall(444, None, ctypes.c_long(0), 1) >= 1
sys.exit(not (landlock and libc.unshare(0x10020000) == 0 and libc.mount(b"none", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0))
"""


class Bench:
    """A process of some user that judges programs, as opd-bench would."""

    def __init__(self, python: str, user: int | None) -> None:
        self.uid = os.geteuid() if user is None else user
        self.identity = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self.process = subprocess.Popen(
            [python, "-B", "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PYTHONPATH": str(CHECKOUT), "TOKEN_OF_OURS": "hunter2"},
            **self.identity,
        )
        self.isolation = json.loads(self.process.stdout.readline())

    def run(self, program: str, *tests: str, **limits: float) -> sandbox.Outcome:
        print(json.dumps([program, tests, limits]), file=self.process.stdin, flush=True)
        return sandbox.Outcome(*json.loads(self.process.stdout.readline()))

    def value(self, program: str, call: str = "f()", **limits: float) -> str:
        """What ``call`` returns inside, as text; the outcome's detail where nothing came back."""
        detail = self.run(program, f"assert {call} == 'no such value'", **limits).detail
        return detail.removeprefix(f"{call} gave ").removesuffix(", not 'no such value'")

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        self.process.stdout.close()


def python_for(user: int | None) -> str:
    """An interpreter that ``user`` can start and that can see the checkout."""
    if user is None:
        return sys.executable
    for python in (sys.executable, shutil.which("python3", path=os.defpath)):
        check = "import sys, opd_bench.sandbox; sys.exit(sys.version_info < (3, 11))"
        try:
            done = subprocess.run(
                [python or "", "-B", "-c", check], cwd="/", env={"PYTHONPATH": str(CHECKOUT)}, user=user, group=user, extra_groups=[]
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip("no Python >= 3.11 and checkout that a plain user can read")


def skip_if_refused(refusal: str, python: str, identity: dict) -> None:
    """Skip where the kernel refuses the walls; fail where it is only us who cannot build them."""
    assert subprocess.run([python, "-c", KERNEL_ALLOWS], cwd="/", **identity).returncode != 0, refusal
    pytest.skip(refusal)


@pytest.fixture(scope="module", params=["root", "plain user"] if os.geteuid() == 0 else ["this user"])
def bench(request):
    user = NOBODY if request.param == "plain user" else None
    python = python_for(user)
    bench = Bench(python, user)
    if isinstance(bench.isolation, dict):
        bench.close()
        skip_if_refused(bench.isolation["refused"], python, bench.identity)
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def usable_afterwards(request):
    """After every attack the pool still tells right from wrong."""
    yield
    if "bench" in request.fixturenames:
        bench = request.getfixturevalue("bench")
        marker = f"{GOOD}  # after {request.node.name}"
        assert bench.run(marker, *ADDS).passed
        assert bench.run(marker.replace("sum", "len"), *ADDS).status == "failed"


@pytest.fixture
def isolated():
    try:
        sandbox.isolation()
    except UserError as refusal:
        skip_if_refused(str(refusal), sys.executable, {})


@pytest.fixture
def public(bench):
    """A directory that everyone may read and write, were it not for the sandbox."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_right_passes_and_wrong_fails(bench):
    assert bench.run(GOOD, *ADDS) == sandbox.Outcome(True, "passed", "")
    assert bench.run(GOOD, "assert f([1, 2]) == 4") == sandbox.Outcome(False, "failed", "f([1, 2]) gave 3, not 4")
    assert bench.run(GOOD, *ADDS, "assert f([1]) == 2").status == "failed"


def test_values_are_compared_by_type_and_content(bench):
    assert bench.run("def f(): return {3, 1, 2}", "assert f() == {1, 2, 3}").passed
    assert bench.run("def f(): return {'b': (1, [2.0]), 'a': -0.0}", "assert f() == {'a': 0.0, 'b': (1, [2.0])}").passed
    assert bench.run("def f(): return {'b': (1, [2]), 'a': 0.0}", "assert f() == {'a': 0.0, 'b': (1, [2.0])}").status == "failed"
    assert bench.run("def f(): return True", "assert f() == 1").status == "failed"


@pytest.mark.parametrize("program", ["def f(a:", "\0", "\ud800", "1 / 0", "def f(a): raise KeyError", "def g(a): return 3"])
def test_a_broken_program_is_an_error(bench, program):
    assert bench.run(program, *ADDS).status == "error"


def test_an_endless_loop_times_out(bench):
    assert bench.run("while True: pass", *ADDS, timeout_s=0.3).status == "timeout"
    assert bench.run("import time\ntime.sleep(60)", *ADDS, timeout_s=0.1).status == "timeout"
    assert bench.run("def f(a):\n    try:\n        while True: pass\n    finally:\n        f(a)", *ADDS, timeout_s=0.3).status == "timeout"


def test_no_process_or_thread_can_be_started(bench):
    forks = """
import os
def f():
    started = 0
    for _ in range(8):
        try:
            if os.fork() == 0:
                os._exit(0)
            started += 1
        except OSError:
            pass
    return started"""
    assert bench.value(forks) == "0"
    assert "can't start new thread" in bench.value("import threading\ndef f(): threading.Thread(target=print).start()")
    assert bench.value("import os\ndef f(): os.execv('/bin/true', ['true'])").startswith(("PermissionError", "FileNotFoundError"))


def test_memory_is_limited(bench):
    hog = "def f(a):\n    return len(bytearray(100 << 20))"
    assert bench.run(hog, "assert f([]) == 104857600", memory_mb=64).status == "memory"
    assert bench.run(hog, "assert f([]) == 104857600", memory_mb=256).passed


def test_limits_bind_an_ordinary_user_without_privileges(bench):
    program = """
import ctypes, os, resource as r
def f():
    libc, capabilities = ctypes.CDLL(None), ctypes.create_string_buffer(24)
    assert libc.capget(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), capabilities) == 0
    limits = [r.getrlimit(x) for x in (r.RLIMIT_NPROC, r.RLIMIT_CORE, r.RLIMIT_FSIZE, r.RLIMIT_AS, r.RLIMIT_CPU)]
    return [os.getuid(), os.getgid(), any(capabilities.raw), libc.prctl(39, 0, 0, 0, 0), limits]"""
    limits = "[(0, 0), (0, 0), (1048576, 1048576), (134217728, 134217728), (3, 3)]"
    assert bench.value(program, memory_mb=128) == f"[65534, 65534, False, 1, {limits}]"


def test_new_namespaces_are_refused(bench):
    assert (
        bench.value("import ctypes\ndef f(): return [ctypes.CDLL(None).unshare(x) for x in (1 << 28, 1 << 17, 1 << 30)]") == "[-1, -1, -1]"
    )


def test_network_is_unreachable(bench):
    program = """
import socket
def f(tcp, udp, name):
    reached = []
    for family, kind, address in ((2, 1, ('127.0.0.1', tcp)), (2, 2, ('127.0.0.1', udp)), (1, 1, chr(0) + name)):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(1)
                s.connect(address)
                s.send(b'x')
                reached.append(address)
        except OSError:
            pass
    return reached"""
    name = f"opd-bench-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(1, 1) as local,
    ):
        udp.bind(("127.0.0.1", 0))
        local.bind(f"\0{name}")
        local.listen()
        call = f"f({tcp.getsockname()[1]}, {udp.getsockname()[1]}, {name!r})"
        outside: dict = {}
        exec(program, outside)
        assert len(eval(call, outside)) == 3
        assert bench.value(program, call) == "[]"


def test_nothing_outside_the_box_can_be_written(bench, public):
    inside = "def f():\n    open('x', 'w').write('note')\n    return open('x').read()"
    assert bench.value(inside) == "'note'"
    for folder in (public, "/tmp", "/", "/dev/shm", os.path.dirname(os.__file__)):
        outside = f"def f():\n    open({str(folder)!r} + '/opd-bench-was-here', 'w')"
        assert bench.value(outside).startswith(("PermissionError", "FileNotFoundError", "OSError: [Errno 30]"))
        assert not os.path.exists(f"{folder}/opd-bench-was-here")
    assert "Error" in bench.value("def f():\n    open('x', 'wb').write(bytes(2 << 20))")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_our_files_cannot_be_read(bench, public, mode):
    secret = public / "secret"
    secret.write_text("hunter2")
    os.chown(secret, bench.uid, -1)
    secret.chmod(mode)
    for path in (secret, CHECKOUT / "pyproject.toml", "/etc/passwd", "/proc/self/environ"):
        assert bench.value(f"def f(): return open({str(path)!r}).read()").startswith(("FileNotFoundError", "PermissionError"))


def test_landlock_holds_where_permissions_would_allow(bench):
    if bench.isolation != "landlock":
        pytest.skip(f"walls of {bench.isolation}")
    assert bench.value("import os\ndef f(): return os.stat('/').st_mode & 0o5") == "5"
    assert bench.value("import os\ndef f(): return os.listdir('/')").startswith("PermissionError")


def test_environment_and_descriptors_are_clean(bench):
    assert bench.value("import os\ndef f(): return dict(os.environ)") == "{}"
    assert bench.value("import ctypes\ndef f(): return ctypes.CDLL(None).getenv(b'TOKEN_OF_OURS')") == "0"
    program = "import os\ndef f():\n    found = []\n    for n in range(4, 1024):\n        try: os.fstat(n); found.append(n)\n"
    assert bench.value(program + "        except OSError: pass\n    return found") == "[]"


def test_other_processes_are_out_of_sight_and_reach(bench):
    with subprocess.Popen(["sleep", "60"], **bench.identity) as victim:
        assert bench.value(f"import os\ndef f(): os.kill({victim.pid}, 9)").startswith(("ProcessLookupError", "PermissionError"))
        assert bench.value("import os\ndef f(): os.kill(os.getppid(), 15)").startswith(("ProcessLookupError", "PermissionError"))
        assert bench.value("import os\ndef f(): return [os.getppid(), os.path.exists('/proc')]") == "[1, False]"
        assert victim.poll() is None
        victim.kill()


@pytest.mark.parametrize(
    "leave", ["os._exit(0)", "sys.exit(0)", "raise SystemExit", "os.kill(os.getpid(), 9)", "os.abort()", "os.close(3)"]
)
def test_leaving_early_never_passes(bench, leave):
    for program in (f"import os, sys\n{leave}", f"import os, sys\ndef f(a):\n    {leave}"):
        assert bench.run(program, *ADDS).status in ("error", "killed")


@pytest.mark.parametrize(
    "program",
    [
        "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(a): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(a): return Yes()",
        "class Yes(int):\n    def __repr__(self): return '3'\n    __class__ = int\ndef f(a): return Yes(1)",
        "print('passed', flush=True)\ndef f(a): print('passed', flush=True)",
        'import os\nfor n in range(64):\n    try: os.write(n, b\'{"end": "exit"}\\n\')\n    except OSError: pass\nos._exit(0)',
        "import os\nos.write(3, b'=passed\\n=True\\n')\nos._exit(0)",
        "import os\nos.write(3, b'=3')\nos._exit(0)",
        "import os\nos.write(3, b'=3\\n')\nos._exit(0)",
        "import os\ndef f(a):\n    os.write(3, b'\\n' * 9)\n    return 3",
        "import builtins\nbuiltins.ascii = builtins.repr = lambda v: 'True'\ndef f(a): return 1",
        "import sys\nsys.modules['__main__'].encode = lambda v: 'passed'\ndef f(a): return 1",
        "import os\nos._exit = os.write = lambda *_: 0\ndef f(a): return 1",
        "def f(a): return float(sum(a))",
        "def f(a): return str(sum(a))",
    ],
)
def test_success_cannot_be_forged(bench, program):
    outcome = bench.run(program, *ADDS)
    assert not outcome.passed
    assert outcome.status in ("failed", "error")


def test_expected_values_are_not_in_the_programs_memory(bench):
    program = """
import gc, sys
def f(*_):
    places, frame = [gc.get_objects()], sys._getframe()
    while frame:
        places.append(list(frame.f_locals.values()))
        frame = frame.f_back
    return any('356154289' in repr(x)[::-1] for place in places for x in place if type(x) in (str, bytes, int, list, dict))"""
    assert bench.run(program, "assert f() == 982451653", timeout_s=20).detail == "f() gave False, not 982451653"
    assert bench.run(program, "assert f(982451653) == True", timeout_s=20).passed  # it does find what is there


def test_one_program_does_not_affect_the_next(bench):
    first = """
import builtins, math, os, sys
math.pi, builtins.sum, sys.left_behind = 3, max, True
os.mkdir('folder'); open('folder/file', 'w').write('x'); os.chmod('folder', 0); os.chmod('.', 0)
def f(): return 0"""
    second = """
import math, os, sys
def f():
    open('new', 'w').write('x')
    return [math.pi, sum([1, 2]), hasattr(sys, 'left_behind'), os.listdir()]"""
    assert bench.run(first, "assert f() == 0").passed
    assert bench.run(second, "assert f() == [3.141592653589793, 3, False, ['new']]").passed


def test_programs_see_the_same_chance_and_hash_order_everywhere(bench):
    program = "import random\ndef f(): return [random.random(), hash('a')]"
    other = Bench(python_for(None), None)
    assert other.value(program) == bench.value(program)
    other.close()


def test_kernel_refusal_is_an_error_unless_unsafe():
    script = """
import ctypes, os
uid, gid = os.getuid(), os.getgid()
os._exit(77) if ctypes.CDLL(None).unshare(1 << 28) else None
for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
    open(f"/proc/self/{name}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
from opd_bench import errors, sandbox
try:
    sandbox.isolation()
except errors.UserError as error:
    print(error)
os.environ[sandbox.CONSENT] = "1"
print(sandbox.isolation())
adds = ["assert f([1, 2]) == 3"]
for program in ("def f(a): return sum(a)", "def f(a): return 4", "import os\\nos._exit(0)", "while True: pass",
                "import os\\nif os.fork() == 0: os._exit(0)\\ndef f(a): return 3"):
    print(sandbox.run_tests(program, adds, timeout_s=0.5).status)
print(sandbox.run_tests("import os\\ndef f(a): open('x', 'w'); return os.getcwd()", adds).detail.split("'")[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(CHECKOUT)})
    if done.returncode == 77:
        pytest.skip("this kernel grants no user namespace to start from")
    assert done.returncode == 0, done.stderr
    refusal, kind, *statuses, box = done.stdout.splitlines()
    assert "install bubblewrap" in refusal
    assert "--unsafe-code" in refusal
    assert kind == "none (unsafe)"
    assert statuses == ["passed", "failed", "error", "timeout", "error"]
    assert not os.path.exists(box)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_us(isolated, end):
    script = """
from opd_bench import sandbox
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
sandbox.isolation(); print(sandbox._idle[0].process.pid, flush=True)
sandbox.run_tests("while True: pass", ["assert f() == 1"], timeout_s=600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=CHECKOUT, text=True
    ) as bench:
        outer = int(bench.stdout.readline())
        family = [outer]
        for pid in family:
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        gone = [os.pidfd_open(pid) for pid in family]
        bench.send_signal(end)
        assert bench.wait(20) != 0
    for process in gone:
        assert select.select([process], [], [], 20)[0]
        os.close(process)


def test_a_dead_worker_is_replaced(isolated):
    assert sandbox.run_tests(f"{GOOD}  # before", ADDS).passed
    dead = sandbox._idle[-1].process
    dead.kill()
    dead.wait()
    assert sandbox.run_tests(f"{GOOD}  # after", ADDS).passed


def test_programs_leave_no_mounts(isolated):
    if sandbox.isolation() != "landlock":
        pytest.skip("bubblewrap serves one program only")
    assert sandbox.run_tests(f"{GOOD}  # mounts", ADDS).passed
    mounts = Path(f"/proc/{sandbox._idle[-1].process.pid}/mountinfo")
    before = mounts.read_text()
    sandbox.run_tests(f"{GOOD}  # mounts again", ADDS)
    assert mounts.read_text() == before


def test_identical_programs_run_once(isolated, monkeypatch):
    sent = []
    send = sandbox._Worker.send
    monkeypatch.setattr(sandbox._Worker, "send", lambda self, request: (sent.append(request["program"]), send(self, request)))
    once, twice = f"{GOOD}  # once", f"{GOOD}  # other"
    assert sandbox.run_many([(once, ADDS), (twice, ADDS), (once, ADDS)]) == [sandbox.run_tests(once, ADDS)] * 3
    assert sorted(sent) == sorted([once, twice])
    sandbox.run_tests(once, ADDS[:1])
    assert len(sent) == 3


def test_outcomes_keep_the_order_of_the_jobs(isolated):
    outcomes = sandbox.run_many([(f"def f(): return {i}", [f"assert f() == {i // 2 * 2}"]) for i in range(24)])
    assert [outcome.passed for outcome in outcomes] == [True, False] * 12


def test_threads_and_forks_of_ours_share_no_worker(isolated):
    with ThreadPoolExecutor(4) as threads:
        outcomes = threads.map(lambda i: sandbox.run_tests(f"def f(): return {i}", [f"assert f() == {i}"]), range(100, 124))
        assert all(outcome.passed for outcome in outcomes)
    script = """
import os
from opd_bench import sandbox
def passes(n):
    return all(sandbox.run_tests(f"def f(): return {i}", [f"assert f() == {i}"]).passed for i in range(n, n + 20))
assert passes(0)
child = os.fork()
assert passes(100 if child else 200)
assert child == 0 or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, timeout=60).returncode == 0


def test_reference_solutions_pass_their_hidden_tests(isolated):
    jobs = [(problem.solution, problem.hidden_tests()) for problem in islice(task_module("functions").problems("train", 7), 30)]
    assert all(outcome.passed for outcome in sandbox.run_many(jobs))
    assert not any(outcome.passed for outcome in sandbox.run_many([("def f(a): return None", tests) for _, tests in jobs]))


@pytest.mark.parametrize(
    "test", ["assert f(1)", "assert f(1) != 2", "f(1) == 2", "assert f(1) == g(2)", "assert f(1) == 2; x = 1", "assert f("]
)
def test_another_form_of_test_or_none_is_a_user_error(isolated, test):
    with pytest.raises(UserError, match="not of the form"):
        sandbox.run_tests(GOOD, [test])
    with pytest.raises(UserError, match="at least one test"):
        sandbox.run_tests(GOOD, [])


def test_encoding_is_one_to_one():
    values = [
        0,
        False,
        0.0,
        0j,
        None,
        "0",
        b"0",
        "",
        [],
        (),
        {},
        set(),
        frozenset(),
        [0],
        (0,),
        {0},
        {0: 0},
        [[0], 0],
        [[0, 0]],
        "[0]",
        "None",
    ]
    assert len({encode(value) for value in values}) == len(values)
    assert encode({"b": 1, "a": {2, 1}}) == encode({"a": {1, 2}, "b": 1}) == "{'a': set(1, 2), 'b': 1}"
    assert encode(-0.0) == encode(0.0)
    assert encode(type("int", (int,), {})(3)) == "?int"
