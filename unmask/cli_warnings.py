"""Warnings on the command line: the ones named here are silent, any other is a line on the standard error."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Beginnings of messages, as regular expressions, and why nobody needs to read them.
SILENT: tuple[tuple[str, type[Warning]], ...] = (
    # peft asks transformers for a property that has another name since 5.24; both answer the same until v6.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
    # A picture of `--trace` has a box for a character that the font lacks, and so says it itself.
    (r"Glyph \d+ \(.*\) missing from font", UserWarning),
)
# What libraries log: the logger, and a part of the message.
SILENT_LOGS: tuple[tuple[str, str], ...] = (
    # Our own comparison of the recipes names every key that a resumed run changes (`training/resume.py`).
    ("transformers.trainer_utils", r"do not match the ones in the `trainer_state\.json`"),
    # True of FSDP1. FSDP2, which we use, keeps a block gathered while its activations are recomputed.
    ("transformers.training_args", r"redundant AllGather in the backward pass"),
)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning once, in one line, but for the silent ones; Python's own -W options come first.

    What libraries log goes on to their own handlers, which print it, from the level "warning" up.
    """
    said: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            rank = os.environ.get("RANK", "0")
            print(f"warning{'' if rank == '0' else f' (process {rank})'}: {text}", file=sys.stderr)

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if not sys.warnoptions:
            warnings.simplefilter("default")
            for message, category in SILENT:
                warnings.filterwarnings("ignore", message, category)
        warnings.showwarning = show
        for name, message in SILENT_LOGS:
            silent = _Silent(message)
            logging.getLogger(name).addFilter(silent)
            stack.callback(logging.getLogger(name).removeFilter, silent)
        yield


class _Silent(logging.Filter):
    def __init__(self, message: str):
        super().__init__()
        self.message = re.compile(message)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.message.search(record.getMessage()) is None
