"""A response appearing out of masks, as lines of text."""

from __future__ import annotations

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unmask.data.inspect import visible

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
    """Draw the response after some of its forwards: masks grey, what has just been committed in green.

    Before each line stands the number of the forward, from 1.

    Args:
        ids: tokens of the response.
        commit_step: step that committed each of them, from 0.
        frames: number of lines, spread evenly over the forwards that committed something; the last line
            is the whole response.
    """
    texts = token_texts(ids, tokenizer)
    steps = sorted(set(commit_step))
    count = min(frames, len(steps))
    shown = [steps[(k + 1) * len(steps) // count - 1] for k in range(count)]
    lines, previous = [], -1
    for step in shown:
        line = Text(f"  {step + 1:>3} ", style="dim")
        for text, committed in zip(texts, commit_step, strict=True):
            if committed > step:
                line.append(MASK_GLYPH * max(1, len(text)), style="bright_black")
            else:
                line.append(text, style="bold green" if committed > previous else "default")
        lines.append(line)
        previous = step
    return lines
