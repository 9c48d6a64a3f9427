"""The process of a program: run its text, then do what its tests ask."""

from __future__ import annotations

import ast
import builtins
import io
import json
import operator
import pickle
import re
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from unmask.evaluation.sandbox.exchange import Encoder, Ended, Wire

IS_TEST = re.compile(r"check|test|assert")


def parts(source: str, split: bool) -> tuple[ast.Module, ast.Module]:
    """The program and its tests. Split, a text ends with its tests: asserts, `check` and `test_...`, constants."""
    body = ast.parse(source, "<solution>").body
    start = len(body)
    while split and start and _is_test(body[start - 1]):
        start -= 1
    return ast.Module(body[:start], []), ast.Module(body[start:], [])


def _is_test(node: ast.stmt) -> bool:
    match node:
        case ast.Assert():
            return True
        case ast.FunctionDef(name=name) | ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return bool(IS_TEST.match(name))
        case ast.Assign(targets=[ast.Name()], value=value):
            try:
                ast.literal_eval(value)
            except ValueError:
                return False
            return True
        case ast.For() | ast.While() | ast.If() | ast.With() | ast.Try():
            return any(isinstance(part, ast.Assert) for part in ast.walk(node))
    return False


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **named: function(*args, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "repr": repr,
}


class Served:
    """The program's side: run its text, then do what the tester asks."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.encoder = wire, Encoder()

    def run(self, source: str, split: bool) -> None:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module

        def top_level() -> dict[str, Any]:
            exec(compile(parts(source, split)[0], "<solution>", "exec"), module.__dict__)
            names = {key: value for key, value in vars(module).items() if not key.startswith("__")}
            modules = [key for key, value in names.items() if isinstance(value, types.ModuleType)]
            return {"names": names, "modules": modules}

        self.answer(top_level)
        while True:
            self.serve()

    def serve(self) -> tuple[Any, ...]:
        """Do what the next message asks; the message itself if it is the answer to a call of ours."""
        message = Unpickler(self.wire.receive(), self).load()
        if message[0] not in OPERATIONS:
            return message
        operation, args, named = message
        self.answer(lambda: OPERATIONS[operation](*args, **named))
        return ()

    def answer(self, work: Callable[[], Any]) -> None:
        try:
            text = json.dumps({"value": self.encoder.encode(work())})
        except Ended:
            raise
        except BaseException as error:
            text = json.dumps({"raised": self.described(error)})
        self.wire.send(text.encode())

    @staticmethod
    def described(error: Any) -> list[Any]:
        """Name, the nearest builtin class, message and errno of an exception."""
        kinds = [
            kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind
        ]
        try:
            message = str(error)
        except BaseException:
            message = ""
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(number, int):
            message = f"{error.strerror}: {error.filename!r}" if error.filename else str(error.strerror)
        return [type(error).__name__, kinds[0] if kinds else "Exception", message[:1000], number]

    def persistent(self, key: tuple[str, int]) -> Any:
        kind, number = key
        if kind == "handle":
            return self.encoder.objects[number]

        def function_of_the_tests(*args: Any) -> Any:
            self.wire.send(json.dumps({"call": number, "args": self.encoder.encode(args)}).encode())
            while not (message := self.serve()):
                pass
            if message[0] == "raise":
                raise message[1]
            return message[1]

        return function_of_the_tests


class Unpickler(pickle.Unpickler):
    """Reads what the tester sent."""

    def __init__(self, data: bytes, served: Served) -> None:
        super().__init__(io.BytesIO(data))
        self.served = served

    def persistent_load(self, pid: Any) -> Any:
        return self.served.persistent(pid)


def run_program(sock: socket.socket, job: dict[str, Any]) -> None:
    """Run the program and serve its tests, until they are gone."""
    Served(Wire(sock, sys.maxsize)).run(job["solution"], job["split"])
