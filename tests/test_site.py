"""The documentation site: every public name is in its reference, and it loads nothing from the network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import unmask

ROOT = Path(__file__).resolve().parent.parent
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "use": "href"}


class Page(HTMLParser):
    """The ids of a page, and the addresses that it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if (address := values.get(LOADING.get(tag, ""))) and values.get("rel") != "canonical":
            self.loads.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages of the site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(folder),
    ]  # --quiet hides all
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = folder.rglob("*.html")
    return {str(file.relative_to(folder)): Page(file.read_text(encoding="utf-8")) for file in files}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: dict[str, Page]) -> None:
    shown = set().union(*(page.ids for name, page in site.items() if name.startswith("reference/")))
    assert [name for name in unmask.__all__ if f"unmask.{name}" not in shown] == []


@pytest.mark.slow
def test_no_page_loads_anything_from_the_network(site: dict[str, Page]) -> None:
    assert len(site) > 10 and all(page.loads for page in site.values())
    loads = {f"{name}: {address}" for name, page in site.items() for address in page.loads}
    assert [load for load in sorted(loads) if re.search(r": (\w+:)?//", load)] == []
