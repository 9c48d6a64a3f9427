"""What a program and its tests tell each other: calls as pickles to the program, plain data as JSON from it.

A pickle runs code where it is read, so the tests never read one. What the program returns is rebuilt from JSON as
exact builtin and standard types, or is a `Handle`: an object that the tests can call, index and iterate, and whose
comparison and arithmetic are not the program's.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any


class Ended(BaseException):
    """The other side is gone, or what it sent is not a message."""


class Wire:
    """Messages over a socket: eight bytes of length, then the message."""

    def __init__(self, sock: socket.socket, most: int) -> None:
        self.sock, self.most = sock, most

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(struct.pack("!Q", len(data)) + data)
        except OSError as error:
            raise Ended from error

    def receive(self) -> bytes:
        (size,) = struct.unpack("!Q", self._read(8))
        if size > self.most:
            raise MemoryError(f"a value of {size} bytes")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self.sock.recv(min(size - len(parts), 1 << 20))
            except OSError as error:
                raise Ended from error
            if not part:
                raise Ended
            parts += part
        return bytes(parts)


PLAIN_TYPES = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set)
}
BY_TEXT: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": complex,
    "Decimal": Decimal,
    "Fraction": Fraction,
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "type": PLAIN_TYPES.__getitem__,
}
BY_ITEMS: dict[str, Callable[[list], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "range": lambda items: range(*items),
    "timedelta": lambda items: timedelta(*items),
    "dict": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


class Encoder:
    """What the program sends: plain data as JSON, anything else as the number of a handle."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            value = value.item()
        if value is None or value is True or value is False:
            return value
        if isinstance(value, int) and not -(2**63) < value < 2**63:
            return ["int", hex(value)]
        if isinstance(value, int | float | str):  # of a subclass, JSON takes the plain value
            return value
        kind: Any
        for kind in (list, tuple, set, frozenset, deque):
            if isinstance(value, kind):
                return [kind.__name__, *map(self.encode, kind.__iter__(value))]
        if isinstance(value, dict):
            return ["dict", *(self.encode(part) for pair in dict.items(value) for part in pair)]
        if isinstance(value, bytes | bytearray):
            return [type(value).__name__, value.hex()]
        if isinstance(value, complex | Decimal | Fraction):
            return [type(value).__name__, str(value)]
        if isinstance(value, date):
            return ["datetime" if isinstance(value, datetime) else "date", value.isoformat()]
        if isinstance(value, timedelta):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        if isinstance(value, type) and PLAIN_TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        return ["handle", self.number(value)]

    def number(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]


def decode(value: Any, handle: Callable[[int], Any]) -> Any:
    """The value of what an `Encoder` made of it; nothing but plain data and handles, whatever was sent."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise Ended
        return value
    try:
        kind, *parts = value
        if kind == "handle":
            return handle(int(parts[0]))
        if kind in BY_TEXT:
            return BY_TEXT[kind](str(parts[0]))
        return BY_ITEMS[kind]([decode(part, handle) for part in parts])
    except (KeyError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise Ended from error
