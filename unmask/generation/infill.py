r"""Text with gaps -> the text with its gaps filled.

A gap is written `[[gap:5]]`, of five tokens, or `[[gap:2-8]]`, of two to eight: every length is tried, and
the likeliest text wins. `\[[gap` is the text `[[gap` itself, and anything else that starts with `[[gap` is
refused.

The score of a length is log p(all from the first gap on | the text before it), by the chain rule the sum of
log p(the text after the gaps | the gaps masked), in one forward pass, each token independently; and of
log p(the gaps | the rest), each token as the model saw it when it was committed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.data.tokenizer import ids_without_token
from unmask.errors import UnmaskError
from unmask.generation.prompts import following_ids
from unmask.progress import Bar

MOST_COMBINATIONS = 256  # of lengths
_GAP = re.compile(r"(\\*)\[\[gap(?::\s*(\d+)\s*(?:-\s*(\d+)\s*)?\]\])?")


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
    """Texts and filled gaps in turn, as they were given."""
    tried: list[tuple[tuple[int, ...], float]]
    """Tokens of each gap, and nats: of the gaps given the rest, or of all from the first gap if lengths were
    tried; the best first."""
    num_forwards: int
    """Forward passes, over all lengths tried."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)


def parse_gaps(text: str) -> list[str | Gap]:
    r"""Split a text at its gaps.

    Raises:
        UnmaskError: a gap that is not written `[[gap:5]]` or `[[gap:2-8]]`.

    Examples:
        >>> parse_gaps(r"a [[gap:2]] b [[gap:1-3]] \[[gap:4]]")
        ['a ', Gap(low=2, high=2), ' b ', Gap(low=1, high=3), ' [[gap:4]]']
    """
    parts: list[str | Gap] = []
    before, end = "", 0
    for match in _GAP.finditer(text):
        slashes, low, high = match.groups()
        before += text[end : match.start()] + "\\" * (len(slashes) // 2)
        end = match.end()
        if len(slashes) % 2:
            before += match.group()[len(slashes) :]
        elif low is None:
            around = text[match.start() : match.start() + 20].split("\n")[0]
            raise UnmaskError(
                f"{around!r} is not a gap; write [[gap:5]] or [[gap:2-8]], or \\[[gap for the text itself."
            )
        else:
            parts += [before, Gap(int(low), int(high or low))]
            before = ""
    return [part for part in [*parts, before + text[end:]] if part != ""]


def infill_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[str | Gap],
    *,
    prompt: Example | None = None,
    end: int | None = None,
    end_fill: int = 1,
    batch_size: int = 16,
    **settings: Any,
) -> Infilled:
    """Fill the gaps of a text.

    Special-token strings in the text, that of the mask token too, are plain text. Every combination of the
    lengths of the gaps is filled, and the likeliest text wins; at a tie the shortest.

    Args:
        prompt: a prompt to which the text is the answer.
        end: end token after the text, repeated until the text has a multiple of `end_fill` tokens.
        batch_size: combinations per forward pass.
        **settings: fields of `DiffusionGenerationConfig`.

    Raises:
        UnmaskError: no gap, a range of lengths for a gap with no text after it, more than
            `MOST_COMBINATIONS` combinations, a block-causal model, or as `model.infill`.
    """
    gaps = [part for part in parts if isinstance(part, Gap)]
    if not gaps:
        raise UnmaskError("the text has no gap; write one as [[gap:5]], of five tokens, or [[gap:2-8]].")
    if gaps[-1].low < gaps[-1].high and parts[-1] is gaps[-1] and end is None:
        raise UnmaskError("there is no text after the last gap to find its length by; give one length.")
    count = prod(gap.high - gap.low + 1 for gap in gaps)
    if count > MOST_COMBINATIONS:
        raise UnmaskError(
            f"the gaps have {count:,} combinations of lengths; at most {MOST_COMBINATIONS} are tried: narrow"
            " the ranges."
        )
    ranges = [range(gap.low, gap.high + 1) for gap in gaps]
    combinations = sorted(product(*ranges), key=lambda lengths: (sum(lengths), lengths))
    before = Example([], []) if prompt is None else Example(prompt.input_ids, [True] * len(prompt.input_ids))
    known: list[list[int] | None] = []
    for part in parts:
        follows = Example([0], [False]) if known else before  # in the middle of a text
        known.append(None if isinstance(part, Gap) else following_ids(follows, part, tokenizer))
    settings.setdefault("unused_tokens", ids_without_token(tokenizer, model.config.vocab_size))
    results: list[tuple[float, tuple[int, ...], list[int]]] = []
    num_forwards = 0
    with Bar("trying lengths", count, "lengths") as advance:
        for start in range(0, count, batch_size):
            tried = combinations[start : start + batch_size]
            batch = collate(
                [_row(before, known, lengths, end, end_fill) for lengths in tried], pad_token_id=0
            )
            ids, is_token = (
                batch["input_ids"].to(model.device),
                batch["attention_mask"].to(model.device).bool(),
            )
            is_gap = ~batch["src_mask"].to(model.device)
            output = model.infill(
                ids, is_gap, is_token, return_trace=True, max_new_tokens=sum(tried[-1]), **settings
            )
            scores = _score_after_gap(model, ids, is_gap, is_token) if count > 1 else [0.0] * len(tried)
            for row, lengths in enumerate(tried):
                score = scores[row] + output.confidence[row][is_gap[row]].double().log().sum().item()
                results.append((score, lengths, output.sequences[row].tolist()))
            num_forwards += int(output.num_forwards.sum()) + (len(tried) if count > 1 else 0)
            advance(len(tried))
    results.sort(key=lambda result: -result[0])  # stable: the shorter first
    _, lengths, ids = results[0]
    whole, stop = [], len(before.input_ids)
    for part, piece in zip(parts, _pieces(known, lengths), strict=True):
        start, stop = stop, stop + len(piece)
        whole.append(part if isinstance(part, str) else _decoded(ids, start, stop, tokenizer))
    return Infilled(whole, [(lengths, score) for score, lengths, _ in results], num_forwards)


def _pieces(known: list[list[int] | None], lengths: Sequence[int]) -> list[list[int]]:
    """The ids of each part, zeros in gaps of these lengths."""
    rest = iter(lengths)
    return [[0] * next(rest) if ids is None else ids for ids in known]


def _row(
    prompt: Example, known: list[list[int] | None], lengths: Sequence[int], end: int | None, end_fill: int
) -> Example:
    """Prompt and text with gaps of these lengths; `src_mask` False = a gap."""
    row = Example(list(prompt.input_ids), list(prompt.src_mask))
    for ids, piece in zip(known, _pieces(known, lengths), strict=True):
        row.input_ids += piece
        row.src_mask += [ids is not None] * len(piece)
    size = len(row.input_ids) - len(prompt.input_ids)
    ends = [] if end is None else [end] * (1 + -(size + 1) % end_fill)
    return Example(row.input_ids + ends, row.src_mask + [True] * len(ends))


def _score_after_gap(
    model: Any, ids: Int[Tensor, "B L"], is_gap: Bool[Tensor, "B L"], is_token: Bool[Tensor, "B L"]
) -> list[float]:
    """log p of the text after each row's first gap, given the text before it."""
    masked = (is_gap.long().cumsum(dim=1) > 0) & is_token
    with torch.no_grad():
        nll = model.masked_nll(ids, masked, is_token, is_token & ~masked).double()
    log_p = torch.zeros(ids.shape, dtype=torch.float64, device=nll.device).masked_scatter(masked, -nll)
    return log_p.masked_fill(is_gap, 0.0).sum(dim=1).tolist()


def _decoded(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids[start:stop] after what is before them, which may decide on a space between."""
    before, both = (str(tokenizer.decode(ids[:end], skip_special_tokens=True)) for end in (start, stop))
    alone = str(tokenizer.decode(ids[start:stop], skip_special_tokens=True))
    return both[len(before) :] if both.startswith(before) else alone
