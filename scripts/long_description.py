"""The long description of the package: README.md without the links and pictures that lead nowhere outside a clone.

hatchling calls this at every build (`tool.hatch.metadata.hooks.custom` in pyproject.toml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = r"\((?!https?://|#|mailto:)[^)]*\)"


def long_description(readme: str) -> str:
    """Remove pictures with a relative address, and of links with one all but their text; not in code blocks."""
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    for number in range(0, len(parts), 2):
        text = re.sub(rf"!\[[^\]]*\]{RELATIVE}\n*", "", parts[number])
        text = re.sub(r'<(?:img|source)\b[^>]*\bsrc(?:set)?="(?!https?://)[^>]*>\n*', "", text)
        parts[number] = re.sub(rf"\[([^\]]*)\]{RELATIVE}", r"\1", text)
    return "".join(parts)


class LongDescription(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml leaves to it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the field to the project's metadata."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(readme)}
