"""SIGTERM and SIGINT: save a checkpoint after the current step, then exit with 143 or 130, and say so."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from unmask.progress import is_first_process

# Launchers pass on a signal that has reached every process already: what comes so soon is the same one.
ECHO_SECONDS = 2.0


class StopSignals:
    """Inside, SIGTERM and SIGINT are noted, and can be acted on at the next step.

    While `at_once` is set, as it is at first, a signal ends the process with `SystemExit`, and `at_once` is what is
    then printed; otherwise it is in `received`, and a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.received, self.time, self.pid = 0, 0.0, os.getpid()
        self.at_once, self.ended_by = "stopped before training; nothing to save", 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other thread may listen
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.ended_by and is_first_process():  # now that no progress bar is drawn over it
            print(f"{signal.Signals(self.ended_by).name}: {self.at_once}", file=sys.stderr, flush=True)
        for number, handler in self.before.items():
            # A launcher that sees one process end signals the others, which are about to.
            signal.signal(number, signal.SIG_IGN if self.received and "RANK" in os.environ else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a child process, which encodes data
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.at_once:
            self.ended_by = number
            leave(number)
        elif not self.received:
            self.received, self.time = number, time.monotonic()
            if is_first_process():  # not print: the signal may have interrupted one
                name = signal.Signals(number).name
                os.write(2, f"{name}: saving a checkpoint after this step; again = exit at once\n".encode())
        elif time.monotonic() - self.time > ECHO_SECONDS:
            os._exit(128 + number)


def leave(number: int) -> NoReturn:
    """End the process with the code that shells give a signal."""
    sys.exit(128 + number)
