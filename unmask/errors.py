"""The one error a user should ever see from unmask, printed without a traceback; and its warning."""

from __future__ import annotations


class UnmaskError(ValueError):
    """Input that cannot be used: a recipe, a record, a file, a checkpoint or an argument.

    The message is one line: where, what was expected, what came, what to do. The `unmask` command prints it and
    exits with code 2; `--debug` adds the traceback.
    """


class UnmaskWarning(UserWarning):
    """A setting that works, but possibly not as meant; the `unmask` command prints it in one line."""


class UnmaskNote(UnmaskWarning):
    """What was done where it could have been otherwise: nothing to repair."""
