"""Progress of long work: a bar on a terminal, elsewhere a line every so often, never on the standard output."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from unmask import cli_generate
from unmask.progress import EVERY, Bar, duration


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_so_often_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("scoring", 20_000, "records", clock=clock) as advance:
        for _ in range(50):
            clock.now += 6.0
            advance(24)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 50 * 6 / EVERY
    assert lines[0] == "scoring: 120 of 20,000 records, 1 h 22 min left"  # 19,880 at 4 a second
    assert lines[-1] == "scoring: 1,200 of 20,000 records, 1 h 18 min left"


def test_work_that_ends_soon_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("scoring", 10, "records", clock=clock) as bar:
        for _ in bar.over(range(10)):
            clock.now += 0.99 * EVERY / 10
    assert capsys.readouterr() == ("", "") and bar.progress.tasks[0].completed == 10


def test_what_is_left_is_said_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("encoding", None, "records", clock=clock) as bar:
        for step in range(1, 5):
            clock.now += EVERY
            bar.update(100 * step, total=None if step < 3 else 1000)
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 100 records",
        "encoding: 200 records",
        "encoding: 300 of 1,000 records",
        "encoding: 400 of 1,000 records, 3 min 0 s left",
    ]


def test_a_resumed_run_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("training", 100, "steps", completed=60, clock=clock) as bar:
        for step in (61, 62):
            clock.now += EVERY
            bar.update(step)
    assert capsys.readouterr().err.splitlines()[-1] == "training: 62 of 100 steps, 19 min 0 s left"


@pytest.mark.parametrize("hide", ["rank", "quiet"])
def test_one_process_alone_speaks(
    hide: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    if hide == "rank":
        monkeypatch.setenv("RANK", "1")
    with Bar("a", 3, "b", clock=clock, console=Console(quiet=True) if hide == "quiet" else None) as advance:
        clock.now += 2 * EVERY
        advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (1e5, "1 d 3 h")],
)
def test_a_time_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_forced_colours_make_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Bar("scoring", 2, "records", console=Console(file=stream)) as advance:
        advance()
    assert stream.getvalue() == ""


DRAWS = """
import sys, time
from rich.console import Console
from unmask.progress import Bar
console = Console()
with Bar("outer", 4, "runs", console=console) as bar:
    for number in bar.over(range(4)):
        with Bar("inner", 5, "requests") as advance:
            for _ in range(5):
                time.sleep(0.05)
                advance()
        console.print(f"done {number}")
        print(f"plain {number}")
"""


def drawn(**environment: str) -> tuple[str, str]:
    """What a terminal on the standard error of `DRAWS` gets, and the file on its standard output."""
    reader, writer = pty.openpty()
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "60", **environment}
    with subprocess.Popen(
        [sys.executable, "-c", DRAWS], stdout=subprocess.PIPE, stderr=writer, env=settings, text=True
    ) as process:
        os.close(writer)
        got = b""
        while True:
            try:
                part = os.read(reader, 4096)
            except OSError:  # the other side is closed
                break
            got += part
        out = process.communicate()[0]
    os.close(reader)
    assert process.returncode == 0, got
    return got.decode(), out


def test_bars_are_on_the_terminal_and_not_in_the_file() -> None:
    err, out = drawn()
    assert out == "".join(f"done {number}\nplain {number}\n" for number in range(4))
    assert "outer" in err and "inner" in err and "runs" in err and "done" not in err


def test_a_dumb_terminal_has_no_bar() -> None:
    err, out = drawn(TERM="dumb")
    assert err == "" and out.startswith("done 0\nplain 0\n")


def test_large_weights_and_downloads_alone_keep_the_bars_of_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr(cli_generate, "LARGE", 100)
    found = {}
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        for name in (str(tmp_path), "no/where", "neither: a name"):
            logging.enable_progress_bar()
            enable_progress_bars()
            cli_generate.hide_progress_bars(name)
            found[terminal, name] = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.enable_progress_bar()
    enable_progress_bars()
    assert found == {
        (True, str(tmp_path)): (True, True),
        (True, "no/where"): (False, True),
        (True, "neither: a name"): (False, True),
        (False, str(tmp_path)): (False, False),
        (False, "no/where"): (False, False),
        (False, "neither: a name"): (False, False),
    }
