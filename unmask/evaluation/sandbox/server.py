"""The fork server: an interpreter of its own that loads the standard library once, and forks for each program.

Which processes there are, and what each may see:

    server     reads no program; forks a monitor for each
    monitor    makes the namespaces, keeps the time, says the outcome; runs no code of others
    tester     pid 1 of a new process namespace; runs the tests, calls the program through a socket
    program    pid 1 of a process namespace inside; started before the tester reads the tests

A program never has the tests in its memory, and cannot name, signal, trace or read the tester. The tester runs
none of the program's code: it compares plain data with the real operators. So a verdict depends on values alone.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from typing import Any, NoReturn

from unmask.evaluation.sandbox import isolation
from unmask.evaluation.sandbox.judge import run_tests
from unmask.evaluation.sandbox.program import run_program

PRELOAD = """abc array base64 binascii bisect calendar cmath collections.abc concurrent.futures contextvars copy csv
dataclasses decimal difflib enum fnmatch functools glob hashlib heapq html inspect itertools json locale logging
math multiprocessing numbers operator pathlib pprint queue secrets shlex statistics string subprocess tempfile
textwrap threading timeit tokenize typing unicodedata unittest urllib.parse uuid zlib zoneinfo numpy"""
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork


def main(control: socket.socket) -> None:
    """Fork a monitor for each message; a message is three open files: the program, its tests, where to answer."""
    os.environ.update(ONE_THREAD)
    warnings.simplefilter("ignore")
    for name in PRELOAD.split():
        with contextlib.suppress(ImportError):  # numpy
            importlib.import_module(name)
    os.environ.clear()
    os.environ.update(ONE_THREAD, PATH="/usr/bin:/bin")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()
    control.send(b"r")
    while handles := socket.recv_fds(control, 1, 3)[1]:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                control.close()
                ours.close()
                monitor(handles, its, server)
            os._exit(1)
        its.close()
        for handle in handles:
            os.close(handle)
        with ours:
            if ours.recv(1):  # the monitor has left our user namespace
                ours.send(isolation.map_users(pid).encode())


def monitor(handles: list[int], sync: socket.socket, server: int) -> NoReturn:
    """Run one program, and write its outcome to the last of the open files."""
    source, tests, result = handles
    with open(source, encoding="ascii") as file:
        job = json.load(file)
    with open("/proc/self/statm", encoding="ascii") as file:
        size, resident = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    job["address_space"] = size + (job["megabytes"] << 20)
    processes = os.open("/proc", os.O_RDONLY)  # stays open in the new root
    job["nobody"], folder = isolation.can_be_nobody(), None
    try:
        if job["isolate"]:
            folders = isolation.python_folders()
            isolation.unshare_all()
            sync.send(b"u")
            if not (mapped := sync.recv(1000)):
                raise ConnectionError  # the server died
            if problem := mapped[1:]:
                raise OSError(errno.EPERM, problem.decode())
            isolation.new_root(folders)
        else:
            folder = tempfile.mkdtemp(prefix="unmask-sandbox-")
            os.chdir(folder)
        os.environ.update(dict.fromkeys(("HOME", "TMPDIR"), folder or isolation.PRIVATE_FOLDER))
    except ConnectionError:
        os._exit(1)
    except OSError as error:
        answer(result, "unsandboxed", error.strerror or str(error))
    sync.close()
    isolation.die_with_parent()
    if os.getppid() != server:  # it died before
        os._exit(1)
    isolation.adopt_orphans()
    verdict, its = os.pipe()
    tester = os.fork()
    if tester == 0:
        with contextlib.suppress(BaseException):
            tester_process(job, tests, its)
        os._exit(1)
    os.close(its)
    isolated = os.read(verdict, 1)
    start = time.monotonic()
    end = start + job["seconds"]
    outcome = "error", "the tests left Python"
    if not isolated:
        outcome = "unsandboxed", "no namespaces in a namespace"
    while not select.select([verdict], [], [], min(0.1, max(0, end - time.monotonic())))[0]:
        if time.monotonic() >= end:
            outcome = "timeout", f"it ran longer than {job['seconds']:g} s"
            break
        if memory_above(processes, resident) > job["megabytes"] << 20:
            outcome = "memory", f"its processes together held more than {job['megabytes']} MB"
            break
    else:
        with contextlib.suppress(ValueError, TypeError):
            status, detail = json.loads(os.read(verdict, 1 << 16))
            if status in ("passed", "wrong", "error", "timeout", "memory", "forbidden"):
                outcome = status, str(detail)
    os.kill(tester, signal.SIGKILL)  # pid 1 of its namespace: everything in there ends with it
    os.waitpid(tester, 0)
    if folder is not None:
        kill_orphans(processes)
        shutil.rmtree(folder, ignore_errors=True)
    answer(result, *outcome, time.monotonic() - start)


def answer(result: int, *outcome: Any) -> NoReturn:
    os.write(result, json.dumps(outcome).encode())
    os._exit(0)


def tester_process(job: dict[str, Any], tests: int, verdict: int) -> NoReturn:
    """Start the program, then read the tests and run them."""
    ours, its = socket.socketpair()
    if job["isolate"]:
        isolation.private_folder()
        isolation.unshare_processes()
    isolation.hide_memory()
    program = os.fork()
    if program == 0:
        with contextlib.suppress(BaseException):
            if job["isolate"]:
                isolation.unshare_mounts()
                isolation.private_folder()
            os.setsid()  # so that it has a process group of its own to kill
            confine(job, its.fileno())
            run_program(its, job)
        os._exit(1)
    its.close()
    confine(job, tests, verdict, ours.fileno())
    os.write(verdict, b"1")  # fails if the monitor died before this would have died with it
    with open(tests, encoding="ascii") as file:
        text = json.load(file)
    os.write(verdict, json.dumps(run_tests(ours, job, text, program)).encode())
    os._exit(0)


def confine(job: dict[str, Any], *handles: int) -> None:
    """What the tester and the program both give up; the same random numbers in every run."""
    isolation.only_keep(*handles)
    isolation.limit(job["seconds"], job["address_space"])
    isolation.give_up_rights(job["isolate"] and job["nobody"])
    isolation.die_with_parent()
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def descendants(processes: int) -> dict[int, int]:
    """Pages that each process below this one holds in memory, by /proc."""
    parents, pages = {}, {}
    for name in filter(str.isdigit, os.listdir(processes)):
        with contextlib.suppress(OSError):
            file = os.open(f"{name}/stat", os.O_RDONLY, dir_fd=processes)
            with open(file, encoding="utf-8", errors="replace") as opened:
                fields = opened.read().rpartition(")")[2].split()
            parents[int(name)], pages[int(name)] = int(fields[1]), int(fields[21])
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return {pid: pages[pid] for pid in family - {os.getpid()}}


def memory_above(processes: int, idle: int) -> int:
    """Bytes of memory that the processes below this one hold, each above those of an idle one."""
    size = resource.getpagesize()
    return sum(max(0, pages * size - idle) for pages in descendants(processes).values())


def kill_orphans(processes: int) -> None:
    """Without a process namespace: end what the program left, whose parent is now this one."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in descendants(processes):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.002)
