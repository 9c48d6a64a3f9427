"""Pictures of the tutorials: drawn from a command's own output, small, and without anything from the network."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PICTURES = runpy.run_path(str(ROOT / "scripts" / "pictures.py"))


def test_a_terminal_is_drawn_with_its_colours(tmp_path: Path) -> None:
    output = "\x1b[32mkept\x1b[0m 200\nplain\n"
    PICTURES["draw_terminal"]("unmask data mine.yaml", output, 40, tmp_path / "data.svg")
    texts = [t for t in ElementTree.parse(tmp_path / "data.svg").iter() if t.tag.endswith("}text")]
    drawn = {(t.text or "").replace("\xa0", " ").strip(): t.get("class") for t in texts}
    assert {"unmask data mine.yaml", "kept", "200", "plain"} <= set(drawn)
    assert drawn["kept"] != drawn["200"]


def test_each_picture_is_in_a_tutorial_small_and_self_contained() -> None:
    pages = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "tutorials").glob("*.md"))
    for name in PICTURES["TERMINALS"]:
        text = (ROOT / "docs" / "assets" / name).read_text(encoding="utf-8")
        assert f"../assets/{name})" in pages
        assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for file in (ROOT / "docs" / "assets").glob("*.png"):
        assert file.stat().st_size < 150_000


@pytest.mark.parametrize("name", ["make_data.py", "mine.yaml"])
def test_the_files_are_those_of_the_tutorial(name: str) -> None:
    assert len(PICTURES["files_of"](ROOT / "docs" / "tutorials" / "finetune.md")[name].splitlines()) > 10
