"""How a response was denoised, as lines of text and as a page that plays it step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def trace_lines(
    ids: list[int], commit_step: list[int], tokenizer: PreTrainedTokenizerBase, frames: int = 6
) -> list[Text]:
    """Draw the response after some of its steps, numbered from 1: masks grey, newly committed tokens green.

    `commit_step` counts from 0. The lines, `frames` at most, are spread evenly over the steps that committed
    something; the last is the whole response.
    """
    texts = token_texts(ids, tokenizer)
    steps = sorted(set(commit_step))
    count = min(frames, len(steps))
    lines, previous = [], -1
    for step in [steps[(k + 1) * len(steps) // count - 1] for k in range(count)]:
        line = Text(f"  {step + 1:>3} ", style="dim")
        for text, committed in zip(texts, commit_step, strict=True):
            if committed > step:
                line.append(MASK_GLYPH * max(1, len(text)), style="bright_black")
            else:
                line.append(text, style="bold green" if committed > previous else "default")
        lines.append(line)
        previous = step
    return lines


def write_trace_page(
    file: Path,
    answers: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    *,
    title: str,
    prompt: str = "",
    names: Sequence[str] = (),
) -> None:
    """Write a page that plays the answers, which need their `states`; it loads nothing from elsewhere.

    Raises:
        UnmaskError: the file cannot be written.
    """
    names = names or [f"answer {index + 1}" for index in range(len(answers))]
    data = [
        {"name": name, "prompt": visible(prompt), **trace_data(answer, tokenizer)}
        for name, answer in zip(names, answers, strict=True)
    ]
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    template = (files("unmask") / "templates" / "trace.html").read_text(encoding="utf-8")
    page = Template(template, autoescape=True, keep_trailing_newline=True)
    atomic_write(file, page.render(title=title, data=text, mask=MASK_GLYPH))


def trace_data(answer: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the page plays: the changes of each step, and how the tokens of the answer were committed.

    Returns:
        length: tokens of the canvas; num_ids: those of the answer.
        frames: for each step [position, text] of its changes; text None = masked again; a third entry 0 = the
            same token, whose text changes with its new neighbours.
        bars: for each step the number of tokens committed and of tokens masked again.
        committed: for each token of the answer the step that last committed it.
        confidence, entropy: at that step.
    """
    mask, length = tokenizer.mask_token_id, len(answer.states[0]) if answer.states else 0
    frames: list[list[list[Any]]] = []
    bars: list[list[int]] = []
    previous: list[Any] = [mask] * length
    previous_texts: list[str | None] = [None] * length
    committed = [-1] * length
    for step, state in enumerate(answer.states):
        texts = [
            None if token == mask else text.replace("⏹", "▪")  # which more fonts have
            for token, text in zip(state, token_texts(state, tokenizer), strict=True)
        ]
        changed = [position for position in range(length) if state[position] != previous[position]]
        frame: list[list[Any]] = [[position, texts[position]] for position in changed]
        # The text of a token also changes with its neighbours, where they make a character together.
        for position in range(length):
            if texts[position] != previous_texts[position] and position not in changed:
                frame.append([position, texts[position], 0])
        frames.append(frame)
        masked = sum(state[position] == mask for position in changed)
        bars.append([len(changed) - masked, masked])
        for position in changed:
            committed[position] = step
        previous, previous_texts = state, texts
    per_step = f"{answer.tokens_per_forward:.2f} tokens per step"
    return {
        "length": length,
        "num_ids": len(answer.ids),
        "frames": frames,
        "bars": bars,
        "committed": committed[: len(answer.ids)],
        "confidence": [round(value, 4) for value in answer.confidence],
        "entropy": [round(value, 4) for value in answer.entropy],
        "figures": f"{answer.figures}: {per_step}. Canvas of {length} tokens.",
    }
