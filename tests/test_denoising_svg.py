"""The README's moving picture is what a model wrote, and small."""

from __future__ import annotations

import json
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask import complete

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "docs" / "assets" / "denoising.svg"


def test_the_picture_shows_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = byte_model().eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"instruction": f"Say <{k}>.", "output": "x", "task": f"t{k % 2}"} for k in range(4)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    main = runpy.run_path(str(ROOT / "scripts" / "denoising_svg.py"))["main"]
    main(str(tmp_path / "model"), str(tmp_path / "held.jsonl"), str(tmp_path / "out.svg"))
    printed = capsys.readouterr().out.splitlines()
    shown = [text.text for text in ElementTree.parse(tmp_path / "out.svg").iter() if text.text]
    prompts = [text for text in shown if text.startswith("Say <")]
    assert len(prompts) == len(printed) - 1 == 12
    for prompt, line in zip(prompts, printed[1:], strict=True):
        [answer] = complete(model, tokenizer, [prompt], max_new_tokens=16)
        assert line == f"  {prompt} {answer.text}"


def test_the_committed_picture_moves_by_itself_and_is_small() -> None:
    text = COMMITTED.read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg") and "@keyframes" in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "") and len(text) < 1_000_000
