"""How a response was denoised, as lines of text and as a page that plays it step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Template
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.inspect import visible
from unmask.generation.text import Completion
from unmask.io import atomic_write

MASK_GLYPH = "░"
_CHARACTER = 4  # tokens of one character at most: one for each of its bytes


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode token by token, each on one line: special tokens as a short sign, control characters as
    pictures, and a character of several tokens with its last one."""
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        if ids[start] in special:
            texts.append("⏹" if ids[start] != tokenizer.mask_token_id else MASK_GLYPH)
            continue
        for stop in range(start + 1, min(start + _CHARACTER, len(ids)) + 1):
            text = str(tokenizer.decode(ids[start:stop]))
            if "\ufffd" not in text and not special.intersection(ids[start:stop]):
                break
        else:
            stop, text = start + 1, str(tokenizer.decode(ids[start : start + 1]))
        texts += [""] * (stop - start - 1) + [visible(text).replace("\n", "")]
    return texts


def drawn(tokens: Iterable[tuple[str, bool, bool]]) -> Text:
    """Draw tokens, each (text, whether it is masked, whether it is new): masks grey, new tokens green."""
    line = Text()
    for text, is_masked, is_new in tokens:
        line.append(text, style="bright_black" if is_masked else "bold green" if is_new else "default")
    return line


def trace_lines(
    ids: list[int], commit_step: list[int], tokenizer: PreTrainedTokenizerBase, frames: int = 6
) -> list[Text]:
    """Draw the response after some of its steps, numbered from 1.

    `commit_step` counts from 0. The lines, `frames` at most, are spread evenly over the steps that committed
    something; the last is the whole response.
    """
    tokens = list(zip(token_texts(ids, tokenizer), commit_step, strict=True))
    steps = sorted(set(commit_step))
    count = min(frames, len(steps))
    lines, previous = [], -1
    for step in [steps[(k + 1) * len(steps) // count - 1] for k in range(count)]:
        shown = (
            (MASK_GLYPH * max(1, len(text)) if at > step else text, at > step, at > previous)
            for text, at in tokens
        )
        lines.append(Text().append(f"  {step + 1:>3} ", style="dim").append_text(drawn(shown)))
        previous = step
    return lines


def write_trace_page(
    file: Path,
    answers: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    names: Sequence[str],
    prompt: str = "",
) -> None:
    """Write a page that plays the answers, which need their `states`; it loads nothing from elsewhere.

    Raises:
        UnmaskError: the file cannot be written.
    """
    data = [
        {"name": name, "prompt": visible(prompt), **trace_data(answer, tokenizer)}
        for name, answer in zip(names, answers, strict=True)
    ]
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    template = (files("unmask") / "templates" / "trace.html").read_text(encoding="utf-8")
    page = Template(template, autoescape=True, keep_trailing_newline=True)
    atomic_write(file, page.render(title=title, data=text, mask=MASK_GLYPH))


def trace_data(answer: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the page plays.

    Returns:
        length: tokens of the canvas; num_ids: those of the answer, with their confidence and entropy.
        frames: for each step [position, text] of its changes; text None = masked again; a third entry 0 = the
            same token, whose text changes with its new neighbours, where they make a character together.
    """
    mask, length = tokenizer.mask_token_id, len(answer.states[0]) if answer.states else 0
    frames: list[list[list[Any]]] = []
    before: list[tuple[Any, str | None]] = [(mask, None)] * length
    for state in answer.states:
        now: list[tuple[Any, str | None]] = [
            (token, None if token == mask else text.replace("⏹", "▪"))  # which more fonts have
            for token, text in zip(state, token_texts(state, tokenizer), strict=True)
        ]
        frames.append(
            [
                [position, new[1]] + [0] * (new[0] == old[0])
                for position, (new, old) in enumerate(zip(now, before, strict=True))
                if new != old
            ]
        )
        before = now
    left = sum(token == mask for token, _ in before[len(answer.ids) :])
    unneeded = f" {left:,} place{'s' * (left > 1)} behind the end left masked." if left else ""
    per_step = f"{answer.tokens_per_forward:.2f} tokens per step"
    return {
        "length": length,
        "num_ids": len(answer.ids),
        "frames": frames,
        "confidence": [round(value, 4) for value in answer.confidence],
        "entropy": [round(value, 4) for value in answer.entropy],
        "figures": f"{answer.figures}: {per_step}. Canvas of {length} tokens.{unneeded}",
    }
