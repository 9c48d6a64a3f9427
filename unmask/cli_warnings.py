"""Warnings on the command line: the ones named here are silent, any other is a line on the standard error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from unmask.errors import UnmaskNote

# Beginnings of messages, as regular expressions, and why nobody needs to read them.
SILENT: tuple[tuple[str, type[Warning]], ...] = (
    # peft asks transformers for a property that has another name since 5.24; both answer the same until v6.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    # A picture of `--trace` has a box for a character that the font lacks, and so says it itself.
    (r"Glyph \d+ \(.*\) missing from font", UserWarning),
)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning once, in one line, except the silent ones; Python's own -W options come first."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            rank = os.environ.get("RANK", "0")
            kind = "note" if issubclass(category, UnmaskNote) else "warning"
            print(f"{kind}{'' if rank == '0' else f' (process {rank})'}: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default")
            for message, category in SILENT:
                warnings.filterwarnings("ignore", message, category)
        warnings.showwarning = show
        yield
