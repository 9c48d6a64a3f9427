r"""Text with gaps -> the text with its gaps filled.

A gap is written `[[gap:5]]`, of five tokens, or `[[gap:2-8]]`, of two to eight: every length is tried, and
the likeliest text wins. `\[[gap` is the text `[[gap` itself, and anything else that starts with `[[gap` is
refused, so that no text is taken for a gap without a word.

How likely a length is: log p(all from the first gap on | what stands before it), by the chain rule the sum of
log p(what stands after the gaps | the gaps masked), in one forward, each token by itself; and of
log p(the gaps | all else), each token as the model saw it when it wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Example
from unmask.data.encode import document_ids
from unmask.errors import UnmaskError

TRIED = 256  # combinations of lengths at most
_MARK = re.compile(r"(\\*)\[\[gap(?::\s*(\d+)\s*(?:-\s*(\d+)\s*)?\]\])?")


@dataclass(frozen=True)
class Gap:
    """A gap of `low` to `high` tokens."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise UnmaskError(
                f"a gap has 1 token or more, its smallest length first; got {self.low} to {self.high}."
            )


@dataclass(frozen=True)
class Infilled:
    """A text with its gaps filled."""

    parts: list[str]
    """Texts and fillings in turn, as they were given."""
    lengths: tuple[int, ...]
    """Tokens of each gap."""
    log_probability: float
    """Of what was written, given all else, in nats; where lengths were tried, also of what comes after."""
    forwards: int
    """Of all lengths tried."""
    tried: list[tuple[tuple[int, ...], float]]
    """Lengths and their log-probability, the best first."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)


def parse_gaps(text: str) -> list[str | Gap]:
    r"""Split a text at its gaps.

    Raises:
        UnmaskError: a gap that is not written `[[gap:5]]` or `[[gap:2-8]]`.

    >>> parse_gaps(r"a [[gap:2]] b [[gap:1-3]] \[[gap:4]]")
    ['a ', Gap(low=2, high=2), ' b ', Gap(low=1, high=3), ' [[gap:4]]']
    """
    parts: list[str | Gap] = []
    before, done = "", 0
    for found in _MARK.finditer(text):
        slashes, low, high = found.groups()
        before += text[done : found.start()] + "\\" * (len(slashes) // 2)
        done = found.end()
        if len(slashes) % 2:
            before += found.group()[len(slashes) :]
            continue
        if low is None:
            line = text.count("\n", 0, found.start()) + 1
            around = text[found.start() : found.start() + 20].split("\n")[0]
            raise UnmaskError(
                f"line {line}: {around!r} is no gap; write [[gap:5]] or [[gap:2-8]], or \\[[gap for the text"
                " itself."
            )
        parts += [before, Gap(int(low), int(high or low))]
        before = ""
    return [part for part in [*parts, before + text[done:]] if part != ""]


def parse_length(text: str) -> Gap:
    """Read a length: "5", or "2-8"."""
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", text)
    if found is None:
        raise UnmaskError(
            f"a length is a number of tokens, such as 5, or a range, such as 2-8; got {text!r}."
        )
    return Gap(int(found[1]), int(found[2] or found[1]))


def infill_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[str | Gap],
    *,
    before: Example | None = None,
    end: int | None = None,
    end_fill: int = 1,
    batch_size: int = 16,
    **settings: Any,
) -> Infilled:
    """Fill the gaps of a text.

    Special-token strings in the text, the mask token's too, are plain text. Every combination of the
    lengths of the gaps is filled, and the likeliest wins (see the head of this module), at a tie the
    shorter.

    Args:
        before: a prompt to which the text is the answer.
        end: end token after the text, repeated until the text has a multiple of `end_fill` tokens.
        batch_size: combinations in one forward.
        **settings: fields of `DiffusionGenerationConfig`.

    Raises:
        UnmaskError: no gap, a length to be found with nothing after it that could tell, more than `TRIED`
            combinations, a block-causal model, or as `model.infill`.
    """
    gaps = [part for part in parts if isinstance(part, Gap)]
    if not gaps:
        raise UnmaskError("the text has no gap; write one as [[gap:5]], of five tokens, or [[gap:2-8]].")
    if gaps[-1].low < gaps[-1].high and parts[-1] is gaps[-1] and end is None:
        raise UnmaskError("nothing stands after the last gap that could tell its length; give one length.")
    count = 1
    for gap in gaps:
        count *= gap.high - gap.low + 1
    if count > TRIED:
        raise UnmaskError(
            f"the gaps have {count:,} combinations of lengths; at most {TRIED} are tried: narrow the ranges."
        )
    choices = sorted(
        product(*(range(gap.low, gap.high + 1) for gap in gaps)), key=lambda one: (sum(one), one)
    )
    given = [None if isinstance(part, Gap) else document_ids(part, tokenizer) for part in parts]
    found: list[tuple[float, tuple[int, ...], list[list[int]]]] = []
    forwards = 0
    for start in range(0, count, batch_size):
        chosen = choices[start : start + batch_size]
        rows = [_row(given, lengths, end, end_fill) for lengths in chosen]
        if before is not None:
            ahead = before.input_ids
            rows = [(ahead + ids, [False] * len(ahead) + is_gap) for ids, is_gap in rows]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        is_token, is_gap = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for index, (row, gap) in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            is_token[index, : len(row)] = True
            is_gap[index, : len(row)] = torch.tensor(gap)
        output = model.infill(
            ids.to(model.device),
            is_gap.to(model.device),
            is_token.to(model.device),
            return_trace=True,
            max_new_tokens=sum(chosen[-1]),
            **settings,
        )
        after = _after(model, ids, is_gap, is_token) if count > 1 else [0.0] * len(rows)
        for index, lengths in enumerate(chosen):
            here = is_gap[index].to(model.device)
            score = output.confidence[index][here].double().log().sum().item() + after[index]
            written = output.sequences[index][here].split(list(lengths))
            found.append((score, lengths, [ids.tolist() for ids in written]))
        forwards += int(output.num_forwards.sum()) + (len(rows) if count > 1 else 0)
    ranked = sorted(found, key=lambda one: -one[0])  # stable: the shorter first
    score, lengths, written = ranked[0]
    texts = iter(str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written)
    filled = [next(texts) if isinstance(part, Gap) else part for part in parts]
    return Infilled(filled, lengths, score, forwards, [(lengths, score) for score, lengths, _ in ranked])


def _after(
    model: Any, ids: Int[Tensor, "B L"], is_gap: Bool[Tensor, "B L"], is_token: Bool[Tensor, "B L"]
) -> list[float]:
    """log p of what stands after each row's first gap, given what stands before it."""
    masked = (is_gap.long().cumsum(dim=1) > 0) & is_token
    tensors = [tensor.to(model.device) for tensor in (ids, masked, is_token, is_token & ~masked)]
    with torch.no_grad():
        nll = model.masked_nll(*tensors).double().cpu()
    found = torch.zeros(ids.shape, dtype=torch.float64)
    found[masked] = -nll
    return found.masked_fill(is_gap, 0.0).sum(dim=1).tolist()


def _row(
    given: list[list[int] | None], lengths: tuple[int, ...], end: int | None, end_fill: int
) -> tuple[list[int], list[bool]]:
    """Ids with gaps of these lengths, and where they are."""
    ids: list[int] = []
    is_gap: list[bool] = []
    left = iter(lengths)
    for part in given:
        piece = [0] * next(left) if part is None else part
        ids += piece
        is_gap += [part is None] * len(piece)
    if end is not None:
        ids += [end] * (1 + -(len(ids) + 1) % end_fill)
    return ids, is_gap + [False] * (len(ids) - len(is_gap))
