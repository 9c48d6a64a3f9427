"""docs/concepts/: the Python prints what the page says, and the pictures show what the code does."""

from __future__ import annotations

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask import complete

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "concepts").glob("*.md"))
PICTURES = runpy.run_path(str(ROOT / "scripts" / "concept_pictures.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_prints_what_the_page_shows(
    page: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    byte_model().save_pretrained(tmp_path / "outputs/demo/final")
    tokenizer.save_pretrained(tmp_path / "outputs/demo/final")
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert len(shown) == 1
    for code, printed in shown:
        exec(compile(code, str(page), "exec"), {})
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", ["noise", "attention", "caches"])
def test_a_picture_is_what_the_code_draws(name: str) -> None:
    assert PICTURES[name]() == (ROOT / f"docs/assets/{name}.svg").read_text(encoding="utf-8")


def test_the_exact_cache_computes_the_least_positions() -> None:
    [none, prefix, dual, exact] = (
        sum(computed for given in PICTURES["computed_positions"](**settings) for _, computed, _ in given)
        for settings in PICTURES["CACHES"].values()
    )
    assert none > prefix > dual > exact
    page = (ROOT / "docs/concepts/caches.md").read_text(encoding="utf-8")
    assert f"Of {none} positions without a cache, an exact cache computes {exact}." in page


def test_the_policies_are_drawn_step_by_step(tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = byte_model().eval()
    picture = ElementTree.fromstring(PICTURES["policies"](model, tokenizer, "Say wool."))
    texts = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    for name, settings in PICTURES["POLICIES"].items():
        [answer] = complete(model, tokenizer, ["Say wool."], max_new_tokens=16, **settings)
        assert any(text.startswith(f"{name}: {answer.num_forwards} step") for text in texts)
    committed = (ROOT / "docs/assets/policies.svg").read_text(encoding="utf-8")
    assert [name for name in PICTURES["POLICIES"] if f"{name}: " not in committed] == []
