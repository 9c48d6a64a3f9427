"""The process of the tests: functions of the program are called through a socket, what they return is compared."""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from unmask.evaluation.sandbox.exchange import Ended, Wire, decode
from unmask.evaluation.sandbox.program import parts

# What the limits and the missing rights of the sandbox are reported as.
FORBIDDEN = (
    *(errno.EPERM, errno.EACCES, errno.EROFS, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL),
    *(errno.EAGAIN, errno.EMFILE, errno.EFBIG, errno.ENOSPC),
)


class Handle:
    """An object of the program: its attributes, calls and items are the program's; equality is identity.

    It has neither comparison nor arithmetic: what a test compares is plain data.
    """

    __slots__ = ("_number", "_tester")

    def __init__(self, tester: Tester, number: int) -> None:
        object.__setattr__(self, "_tester", tester)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._tester.ask("call", self, *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tester.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._tester.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._tester.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._tester.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self._tester.ask("len", self)

    def __bool__(self) -> bool:
        return self._tester.ask("bool", self)

    def __str__(self) -> str:
        return self._tester.ask("str", self)

    def __repr__(self) -> str:
        return self._tester.ask("repr", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._tester.ask("iter", self)
        return iterator if isinstance(iterator, Handle) else iter(iterator)

    def __next__(self) -> Any:
        return self._tester.ask("next", self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an object of the program has no copy")


class Pickler(pickle.Pickler):
    """Sends handles and functions of the tests by their numbers, anything else by value."""

    def __init__(self, data: io.BytesIO, functions: list[Any]) -> None:
        super().__init__(data, pickle.HIGHEST_PROTOCOL)
        self.functions = functions

    def persistent_id(self, obj: Any) -> tuple[str, int] | None:
        if isinstance(obj, Handle):
            return "handle", object.__getattribute__(obj, "_number")
        if isinstance(obj, types.FunctionType):
            self.functions.append(obj)
            return "function", len(self.functions) - 1
        return None


class Tester:
    """The tests' side: functions of the program are called through a socket."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.handles: dict[int, Handle] = {}
        self.functions: list[Any] = []

    def handle(self, number: int) -> Handle:
        if number not in self.handles:
            self.handles[number] = Handle(self, number)
        return self.handles[number]

    def ask(self, operation: str, *args: Any, **named: Any) -> Any:
        self.send((operation, args, named))
        try:
            return self.answer()
        except StopIteration as error:
            if operation == "next":
                raise
            raise RuntimeError("StopIteration") from error  # it would end a `map` of the tests in silence

    def send(self, message: Any) -> None:
        data = io.BytesIO()
        Pickler(data, self.functions).dump(message)
        self.wire.send(data.getvalue())

    def answer(self) -> Any:
        while True:
            try:
                message = json.loads(self.wire.receive())
            except (ValueError, RecursionError) as error:
                raise Ended from error
            match message:
                case {"value": value}:
                    return decode(value, self.handle)
                case {"raised": [str(name), str(base), str(text), number]}:
                    raise rebuilt(name, base, text, number)
                case {"call": int(number), "args": args} if 0 <= number < len(self.functions):
                    try:
                        reply = "result", self.functions[number](*decode(args, self.handle))
                    except Exception as error:
                        kind = type(error).__name__
                        reply = "raise", rebuilt(kind, kind, str(error), None)
                    self.send(reply)
                case _:
                    raise Ended


def rebuilt(name: str, base: str, text: str, number: Any) -> BaseException:
    """An exception of the program, as one of the builtin classes."""
    kind = getattr(builtins, base, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        kind = Exception
    if issubclass(kind, OSError) and isinstance(number, int):
        return OSError(number, text)  # of the class of the number
    try:
        text = text if name == base else f"{name}: {text}"
        return kind(text)
    except TypeError:  # UnicodeDecodeError has five arguments
        return Exception(text)


def run_tests(sock: socket.socket, job: dict[str, Any], tests: str, program: int) -> tuple[str, str]:
    """Status and detail of one program."""
    tester = Tester(Wire(sock, job["megabytes"] << 20))
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    text = job["solution"] if job["split"] else tests
    try:
        found = tester.answer()
        names, modules = found["names"], found["modules"]
        if job["names"] is not None:
            names = {name: names[name] for name in job["names"] if name in names}
        for name, value in names.items():
            if name.startswith("__"):  # __builtins__ would be every function that the tests call
                continue
            if job["names"] is None and name in modules and name in sys.stdlib_module_names:
                space[name] = importlib.import_module(name)
            elif job["names"] is not None or not hasattr(builtins, name):
                space[name] = value
        code = parts(text, True)[1] if job["split"] else text
        exec(compile(code, "<tests>", "exec"), space)
    except Ended:
        return ended(program)
    except BaseException as error:
        return failed(error, text)
    return "passed", ""


def ended(program: int) -> tuple[str, str]:
    """Why there is no answer."""
    done, status = os.waitpid(program, os.WNOHANG)
    deadline = time.monotonic() + 0.2
    while not done and time.monotonic() < deadline:
        time.sleep(0.005)
        done, status = os.waitpid(program, os.WNOHANG)
    if done and os.WIFSIGNALED(status):
        number = signal.Signals(os.WTERMSIG(status))
        if number is signal.SIGXCPU:
            return "timeout", "it used more CPU time than allowed"
        return "error", f"it was killed by {number.name}"
    if done:
        return "error", "it left Python before its tests ended"
    return "error", "it broke the connection to its tests"


def failed(error: BaseException, text: str) -> tuple[str, str]:
    """Status and one line of detail of what ended the tests."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, AssertionError):
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
        if frames and not str(error):
            message = text.splitlines()[(frames[-1].lineno or 1) - 1].strip()
        status = "wrong"
    elif isinstance(error, MemoryError):
        status = "memory"
    elif isinstance(error, OSError) and (error.errno in FORBIDDEN or (error.errno or 0) < 0):  # < 0: no DNS
        status = "forbidden"
    else:
        status = "error"
    message = re.sub(r"0x[0-9a-f]{6,}", "0x...", message)  # addresses change from run to run
    return status, (message.splitlines() or [""])[0][:300]
