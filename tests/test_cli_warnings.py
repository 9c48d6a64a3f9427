"""Warnings on the command line: named ones are silent, any other is one line on the standard error."""

from __future__ import annotations

import warnings

import pytest

from unmask.cli_warnings import SILENT, warnings_in_lines


def test_an_unknown_warning_is_one_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_in_lines():
        for _ in range(2):
            warnings.warn("`past` is now\n  `future`", FutureWarning, stacklevel=1)
        warnings.warn("also this", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: `past` is now `future`\nwarning: also this\n"


def test_named_warnings_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "`is_gradient_checkpointing` is deprecated, use another": FutureWarning,
        "Glyph 9617 (LIGHT SHADE) missing from font(s) DejaVu Sans.": UserWarning,
    }
    assert len(texts) == len(SILENT)
    with warnings_in_lines():
        for text, category in texts.items():
            warnings.warn(text, category, stacklevel=1)
    assert capsys.readouterr().err == ""
