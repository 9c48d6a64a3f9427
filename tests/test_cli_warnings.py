"""Warnings on the command line: named ones are silent, any other is one line on the standard error."""

from __future__ import annotations

import logging
import warnings

import pytest

from unmask.cli_warnings import SILENT, SILENT_LOGS, warnings_in_lines


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


def test_only_the_named_messages_of_a_logger_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    for name, message in SILENT_LOGS:
        logger = logging.getLogger(name)
        with warnings_in_lines():
            logger.error(message.replace("\\", ""))
            logger.error("something else")
        logger.error(message.replace("\\", ""))
    said = [record.getMessage() for record in caplog.records]
    assert said.count("something else") == len(SILENT_LOGS)
    assert len(said) == 2 * len(SILENT_LOGS)  # and afterwards nothing is silent
