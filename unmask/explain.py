"""The page that explains an error: of docs/ next to the package, or inside it where a wheel put it."""

from __future__ import annotations

import re
from pathlib import Path
from traceback import walk_tb

from unmask.shipped import shipped_folder

TROUBLESHOOTING = "troubleshooting.md"
ANY = "…"  # what differs from one message to the next, in a heading
# Part of unmask that raised -> its page, for messages that have no heading.
PAGES = {
    "cli": "cli.md",
    "config": "recipes.md",
    "data": "data.md",
    "diffusion": "math.md",
    "evaluation": "evaluation.md",
    "formats": "checkpoints.md",
    "generation": "generation.md",
    "model": "checkpoints.md",
    "serving": "serving.md",
    "shipped": "recipes.md",
    "training": "training.md",
}


def help_page(message: str, error: BaseException) -> str | None:
    """Where an error is explained: a file and, under a heading that is the message, its line; None without docs."""
    folder = docs_folder()
    if folder is None:
        return None
    if line := _heading_line(message, folder / TROUBLESHOOTING):
        return f"{_shortest(folder / TROUBLESHOOTING)}:{line}"
    modules = [frame.f_globals.get("__name__", "").split(".") for frame, _ in walk_tb(error.__traceback__)]
    parts = [names[1].partition("_")[0] for names in modules if names[0] == "unmask" and len(names) > 1]
    page = next((PAGES[part] for part in reversed(parts) if part in PAGES), TROUBLESHOOTING)
    return _shortest(folder / page)


def docs_folder() -> Path | None:
    """The folder of the documentation, if it is there."""
    folder = shipped_folder("docs")
    return folder if (folder / TROUBLESHOOTING).is_file() else None


def headings(page: str) -> dict[str, int]:
    """The messages that a page explains, each in the code of a heading, and the lines of these headings."""
    lines = enumerate(page.splitlines(), 1)
    return {found[1]: number for number, line in lines if (found := re.fullmatch(r"#+ `(.+)`", line))}


def matches(heading: str, message: str) -> bool:
    """Whether a message is that of a heading, or contains it."""
    return re.search(".*".join(map(re.escape, heading.split(ANY))), message, re.DOTALL) is not None


def _heading_line(message: str, page: Path) -> int | None:
    """The line of the heading that says most of a message."""
    lines = headings(page.read_text(encoding="utf-8"))
    fitting = [heading for heading in lines if matches(heading, message)]
    return lines[max(fitting, key=len)] if fitting else None


def _shortest(file: Path) -> str:
    """A path as people write it: from here, from their home, or whole."""
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if file.is_relative_to(folder):
            return prefix + file.relative_to(folder).as_posix()
    return str(file)
