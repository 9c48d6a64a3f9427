"""The one error a user should ever see from unmask, printed without a traceback; and its milder sister."""

from __future__ import annotations


class UnmaskError(ValueError):
    """Input that cannot be used: a recipe, a record, a file, a checkpoint or an argument.

    The message is one line that names the file, record or field, what was expected and what to do.
    The `unmask` command prints it and exits with code 2; `--debug` adds the traceback. It is a
    `ValueError`, so code that calls the library catches it as such.
    """


class UnmaskWarning(UserWarning):
    """A setting that works, but possibly not as meant; the `unmask` command prints it in one line."""


class UnmaskNote(UnmaskWarning):
    """What was done where it could have been otherwise: nothing to repair."""
