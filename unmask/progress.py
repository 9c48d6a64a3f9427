"""Progress of what takes long, on the standard error, with the time left: a bar on a terminal, elsewhere (a file, a
pipe, a notebook) a line every so often, and none for work that ends before the first is due."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
EVERY = 30.0  # seconds between two lines
SPEED_SECONDS = 600.0  # the last of which the time left is estimated by
WIDE = 80  # columns of a terminal from which on a bar is long

_shown: list[Console] = []  # where bars are now: those within another are drawn by its console


class Bar:
    """Shows how far one piece of work is: `with Bar("scoring", 20_000, "records") as advance: advance(1)`.

    Of several processes the first alone shows anything; within another bar it is drawn below it.

    Args:
        what: the work, such as "scoring".
        total: of its units; None = not known, and then there is no time left.
        unit: their name, in the plural.
        completed: of them, before the bar starts.
        console: that lines are printed to meanwhile: where it is a terminal, the bar is below them. A quiet one
            shows nothing. By default the standard error.
        clock: time in seconds.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str,
        *,
        completed: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.what, self.unit, self.clock = what, unit, clock
        self.hidden = not is_first_process() or (console is not None and console.quiet)
        wanted = [*_shown[-1:], *([console] if console is not None else []), Console(stderr=True)]
        self.console = next((one for one in wanted if _is_screen(one) and not self.hidden), None)
        length = 40 if self.console is not None and self.console.width >= WIDE else 10
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(length),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=self.console is None,
            redirect_stdout=_is_tty(sys.stdout),  # else it would take what goes to a file or a pipe
            redirect_stderr=_is_tty(sys.stderr),
            speed_estimate_period=SPEED_SECONDS,
            get_time=clock,
        )
        self.task = self.progress.add_task(what, total=total, completed=completed)
        self.said = clock()

    def __call__(self, amount: float = 1) -> None:
        """Count units that are done."""
        self.progress.advance(self.task, amount)
        self._say()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items and count each when the next is asked for."""
        for item in items:
            yield item
            self()

    def update(self, completed: float, total: float | None = None) -> None:
        """Set the units that are done, and their number if it has become known."""
        self.progress.update(self.task, completed=completed, total=total)
        self._say()

    def start(self) -> Bar:
        """Show it."""
        if self.console is not None:
            _shown.append(self.console)
        self.progress.start()
        return self

    def stop(self) -> None:
        """Remove it."""
        if self.console is not None and self.progress.live.is_started:
            _shown.pop()
        self.progress.stop()

    def __enter__(self) -> Bar:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _say(self) -> None:
        """Print a line if one is due."""
        now = self.clock()
        if self.console is None and not self.hidden and now - self.said >= EVERY:
            self.said = now
            [task] = self.progress.tasks
            of = "" if task.total is None else f" of {task.total:,.0f}"
            left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
            print(f"{self.what}: {task.completed:,.0f}{of} {self.unit}{left}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this is the process that speaks for all, of one or of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def duration(seconds: float) -> str:
    """Write a time in its two largest units: 3 min 20 s.

    >>> [duration(seconds) for seconds in (0.4, 59.6, 200, 7500, 100_000)]
    ['0 s', '1 min 0 s', '3 min 20 s', '2 h 5 min', '1 d 3 h']
    """
    whole = round(seconds)
    for large, small, long, short in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= long:
            return f"{whole // long} {large} {whole % long // short} {small}"
    return f"{whole} s"


def _is_tty(stream: Any) -> bool:
    return bool(stream is not None and getattr(stream, "rich_proxied_file", stream).isatty())


def _is_screen(console: Console) -> bool:
    """Whether a bar can be drawn: on a terminal that moves its cursor, whatever FORCE_COLOR says of colours."""
    return console.is_interactive and _is_tty(console.file)
