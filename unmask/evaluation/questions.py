"""Likelihoods of the answers to questions: paired draws, and more of them where they could change the answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.diffusion.likelihood import error_of_pairs, likelihood
from unmask.diffusion.rng import keyed_hash
from unmask.generation.text import Completion, complete

DECIDED = 3.0  # standard errors of the difference by which the best choice leads all others


@dataclass(frozen=True)
class Question:
    """Answers to one prompt that are scored together; a single one is an ordinary likelihood."""

    examples: Sequence[Example]  # src_mask True = given, not scored
    sizes: Sequence[int]  # characters of each answer, by which `acc_norm` divides
    seed: int  # of all draws: the answers share them


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p of an answer, in nats."""

    nats: float
    stderr: float  # 0 where every set of masked tokens was enumerated
    draws: int
    forward_passes: int
    tokens: int  # scored


@dataclass(frozen=True)
class Scored:
    """The answers of one question. `open` says of "acc" (nats) and "acc_norm" (nats per character) whether more
    draws could still change which answer is best."""

    bounds: list[Bound]
    open: dict[str, bool]


def score_questions(
    model: Any,
    questions: Sequence[Question],
    *,
    draws: int = 64,
    max_draws: int = 1024,
    batch_size: int = 16,
) -> list[Scored]:
    """Bound -log p of every answer of every question, in nats.

    All answers of a question get the same random numbers, so that what the draws have in common cancels in
    their differences. The draws of a question are doubled, up to `max_draws`, while its best answer leads
    another by less than `DECIDED` standard errors of their difference; which answer is the right one plays no
    part in that.

    Args:
        draws: of every answer, an even number; see `unmask.likelihood`.
    """
    rows: list[Tensor] = [torch.zeros(len(question.examples), 0) for question in questions]
    passes = [[0] * len(question.examples) for question in questions]
    tokens = [[0] * len(question.examples) for question in questions]
    todo, total, scored = list(range(len(questions))), 0, {}
    while todo:
        more = total or draws  # so many further draws of each answer
        examples = [example for index in todo for example in questions[index].examples]
        seeds = torch.tensor([questions[index].seed for index in todo for _ in questions[index].examples])
        found = likelihood(
            model,
            collate(examples, pad_token_id=0),
            num_samples=more,
            batch_size=batch_size,
            record_key=keyed_hash(seeds, total),
        )
        total, start, unsettled = total + more, 0, []
        for index in todo:
            stop = start + len(questions[index].examples)
            drawn = torch.cat([rows[index], found.draw_nll[start:stop]], dim=1)
            exact = found.stderr[start:stop] == 0  # enumerated, if only by the larger number of draws
            rows[index] = torch.where(exact[:, None], found.nll[start:stop, None], drawn)
            for row, (new, size) in enumerate(
                zip(found.passes[start:stop].tolist(), found.num_tokens[start:stop].tolist(), strict=True)
            ):
                passes[index][row] += new
                tokens[index][row] = size
            start, open_ = stop, find_open(rows[index], questions[index].sizes)
            if any(open_.values()) and 2 * total <= max_draws:
                unsettled.append(index)
                continue
            errors = error_of_pairs(rows[index]).tolist()
            figures = zip(rows[index].mean(dim=1).tolist(), errors, passes[index], tokens[index], strict=True)
            bounds = [Bound(nats, error, total, count, size) for nats, error, count, size in figures]
            scored[index] = Scored(bounds, open_)
        todo = unsettled
    return [scored[index] for index in range(len(questions))]


def find_open(rows: Tensor, sizes: Sequence[int]) -> dict[str, bool]:
    """Say which of the measures "acc" and "acc_norm" more draws could still turn to another answer.

    Args:
        rows: (answers, draws), the bound of each draw.
    """
    per_character = rows / torch.tensor(sizes, dtype=rows.dtype).clamp(min=1)[:, None]
    return {name: _is_open(values) for name, values in (("acc", rows), ("acc_norm", per_character))}


def _is_open(rows: Tensor) -> bool:
    best = rows.mean(dim=1).argmin()
    difference = rows - rows[best]
    return bool((difference.mean(dim=1) < DECIDED * error_of_pairs(difference)).any())


def greedy_matches(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_size: int = 16
) -> list[tuple[bool, int]]:
    """Whether greedy decoding writes what each example scores, and the forward passes to find out.

    The canvas has the length of what is scored, and one token is committed a step, the most confident first. A
    single pass settles most: where its most confident token is another one, decoding starts with that.
    """
    whole: dict[str, Any] = {
        "temperature": 0.0,
        "policy": "maskgit_plus",
        "block_length": None,
        "steps": None,
    }
    whole |= {"min_new_tokens": 0, "canvas": "fixed", "approximate_cache": None, "guidance_scale": 0.0}

    def write(some: list[int], length: int, **settings: Any) -> list[Completion]:
        prompts = [
            Example(examples[index].input_ids[:-length], examples[index].src_mask[:-length]) for index in some
        ]
        settings = {**whole, "max_new_tokens": length, **settings}
        return complete(model, tokenizer, prompts, batch_size=batch_size, **settings)

    answers: dict[int, tuple[bool, int]] = {}
    lengths: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        lengths[example.supervised].append(index)
    for length, some in lengths.items():
        first_passes = 0
        if length == 0:
            answers |= dict.fromkeys(some, (True, 0))
            continue
        if model.config.attention == "bidirectional":
            left, first_passes = [], 1
            for index, done in zip(some, write(some, length, steps=1, keep_states=True), strict=True):
                best = max(range(len(done.ids)), key=done.confidence.__getitem__, default=0)
                if len(done.ids) == length and done.ids[best] != examples[index].input_ids[best - length]:
                    answers[index] = False, 1
                else:
                    left.append(index)
            some = left
        for index, done in zip(some, write(some, length), strict=True):
            same = done.ids == examples[index].input_ids[-length:]
            answers[index] = same, first_passes + done.num_forwards
    return [answers[index] for index in range(len(examples))]
