"""Run programs that a model wrote, apart from everything else, and say how their tests ended."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from unmask.errors import UnmaskError, UnmaskWarning

Status = Literal["passed", "wrong", "error", "timeout", "memory", "forbidden"]


class Unsandboxed(UnmaskError):
    """The system does not let programs be isolated, and running them without was not allowed."""


class Program(NamedTuple):
    """A program and the tests it has to pass.

    The two run in different processes. The program never sees its tests, and the tests compare plain data: an exit,
    patched builtins, a forged message or an object that is equal to everything do not pass. Objects of the program's
    own classes reach the tests as handles: attributes, calls, items, iteration, `len`, `bool` and `str` work,
    equality is identity, and there is no arithmetic. Arguments are copied: what is done to them stays in the program.
    """

    solution: str
    tests: str
    names: tuple[str, ...] | None = None
    """What the tests take from the solution; None: each name it defines, but for those of builtins."""


class Outcome(NamedTuple):
    """How a program ended.

    `wrong`: an assert failed. `error`: another exception, or no end of the tests. `forbidden`: an operation that
    the sandbox does not permit (network, files outside, more processes, files or bytes than allowed) raised an
    exception that was not handled.
    """

    status: Status
    detail: str
    """One line: the assert or the exception that ended it."""
    seconds: float
    """Wall-clock time of the program and its tests."""


def run(
    program: Program | str, *, seconds: float = 10, megabytes: int = 1024, allow_unsandboxed: bool = False
) -> Outcome:
    """Run a program and its tests.

    Each runs in new user, mount, process, network and IPC namespaces, with no environment, no files but Python's
    own (read only) and an empty /tmp, no capabilities, and limits of time, memory, processes, open files and
    bytes written; all of its processes are killed when it ends. Its random numbers and hashes are seeded.

    Args:
        program: a text is divided: its last statements that are asserts (or hold one), constants, and calls and
            definitions of functions named `check...`, `test...` or `assert...` are its tests. It chose them, so a
            text that is not trusted to want an honest answer should come as a `Program`.
        seconds: wall-clock time.
        megabytes: address space of each of its processes, above that of an idle Python.
        allow_unsandboxed: where the system has no such namespaces, run with limits alone: the program can then
            read and write what this user can.

    Raises:
        Unsandboxed: programs cannot be isolated here, and `allow_unsandboxed` is False.

    Examples:
        >>> run(Program("def double(x): return 2 * x", "assert double(4) == 8")).status
        'passed'
    """
    return _Server.get().run(program, seconds, megabytes, allow_unsandboxed)


def run_all(
    programs: Sequence[Program | str],
    *,
    seconds: float = 10,
    megabytes: int = 1024,
    allow_unsandboxed: bool = False,
    workers: int | None = None,
) -> list[Outcome]:
    """Run programs, `workers` at once (None: one a CPU core); the outcomes are in the order of the programs."""
    if not programs:
        return []
    from unmask.progress import Bar  # which the sandbox's own process does not need

    server, outcomes = _Server.get(), []
    with (
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
        Bar("running programs", len(programs), "programs") as advance,
    ):
        for outcome in pool.map(
            lambda program: server.run(program, seconds, megabytes, allow_unsandboxed), programs
        ):
            outcomes.append(outcome)
            advance()
    return outcomes


# Imports the server from where this package is, and forgets that folder: no program reads what else is there.
_START = """
import socket, sys
sys.path.insert(0, sys.argv[2])
from unmask.evaluation.sandbox.server import main
sys.path.remove(sys.argv[2])
main(socket.socket(fileno=int(sys.argv[1])))
"""


class _Server:
    """The process that loads Python once and forks for each program; one for this process, until it ends."""

    _current: _Server | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-sPc", _START, str(its.fileno()), str(Path(__file__).parents[3])],
                pass_fds=[its.fileno()],
                env={
                    **{"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"},
                    # Where some Pythons have their library; no program sees it.
                    **{name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        self._control, self._owner, self._warned = ours, os.getpid(), False
        if ours.recv(1) != b"r":
            raise UnmaskError(f"sandbox: {sys.executable} could not be started; what it wrote is above.")
        atexit.register(self.close)

    @classmethod
    def get(cls) -> _Server:
        if sys.platform != "linux":
            raise Unsandboxed(f"sandbox: programs run on Linux alone; this is {sys.platform}.")
        with cls._lock:
            server = cls._current
            if server is None or server._owner != os.getpid() or server._process.poll() is not None:
                server = cls._current = cls()
            return server

    def close(self) -> None:
        self._control.close()
        if self._owner == os.getpid():
            self._process.wait()

    def run(self, program: Program | str, seconds: float, megabytes: int, allow_unsandboxed: bool) -> Outcome:
        status, *rest = self._send(program, seconds, megabytes, isolate=True)
        if status == "unsandboxed":
            problem = f"sandbox: this system does not let a program be isolated ({rest[0]})"
            if not allow_unsandboxed:
                raise Unsandboxed(
                    f"{problem}; allow user namespaces (in a container: run it with that permission), or pass "
                    "--allow-unsandboxed and trust the programs with what this user may do."
                )
            if not self._warned:
                self._warned = True
                warnings.warn(f"{problem}; programs run with limits alone.", UnmaskWarning, stacklevel=3)
            status, *rest = self._send(program, seconds, megabytes, isolate=False)
        return Outcome(status, *rest)

    def _send(self, program: Program | str, seconds: float, megabytes: int, *, isolate: bool) -> list:
        if isinstance(program, str):
            solution, tests, names = program, "", None
        else:
            solution, tests, names = program
        job = {
            "solution": solution,
            "split": isinstance(program, str),
            "names": names,
            "seconds": seconds,
            "megabytes": megabytes,
            "isolate": isolate,
        }
        ours, its = socket.socketpair()
        answer = b""
        with ours, its, _memory_file(job) as source, _memory_file(tests) as other, suppress(OSError):
            with self._lock:
                socket.send_fds(self._control, [b"j"], [source.fileno(), other.fileno(), its.fileno()])
            its.close()
            answer = ours.recv(1 << 16)
        if not answer:
            raise UnmaskError(
                "sandbox: a process of it was killed, probably for lack of memory; run it again."
            )
        return json.loads(answer)


@contextmanager
def _memory_file(content: Any) -> Iterator[BinaryIO]:
    """An open file of this JSON, in memory alone."""
    with open(os.memfd_create("unmask"), "w+b") as file:
        file.write(json.dumps(content).encode())
        file.seek(0)
        yield file
