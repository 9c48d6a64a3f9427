"""A file of answers: a line of JSON an answer, in the order of the prompts; resumable, by several processes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Example
from unmask.errors import UnmaskError
from unmask.generation.prompts import Prompt
from unmask.generation.text import completions
from unmask.processes import gather, rank_and_size

SHARED = 64  # prompts that each of several processes answers before they exchange the answers


Answer = Callable[
    [Sequence[Example], Sequence[int], Callable[[int], None] | None], Iterable[tuple[int, dict[str, Any]]]
]
"""(prompts, their seeds, a function called with the number done) -> index and fields of the line of each, in any
order."""


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
    *,
    prefix: str = "",
    **settings: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer prompts by `completions`; `prefix` is what they already begin the response with."""
    for index, done in completions(model, tokenizer, examples, seed=list(seeds), advance=advance, **settings):
        yield (
            index,
            {
                "response": prefix + done.text,
                "tokens": len(done.ids),
                "forward_passes": done.num_forwards,
                "tokens_per_forward": round(done.tokens_per_forward, 4),
            },
        )


def answer_file(
    answer: Answer,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    samples: int = 1,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Answer prompts and write one JSON line an answer, in the order of the prompts; resumable.

    Several processes share the prompts out, and the first writes.

    Args:
        answer: `generate_answers` or `unmask.evaluation.choose.choose_answers` with a model and settings.
        samples: answers to each prompt; answer i is drawn from seed + i.
        resume: continue after the lines that `out` has; they must be of these prompts and settings.
        settings: written in every line.
        advance: called with the number of answers done, those already in the file first.

    Returns:
        Numbers of answers, tokens and forward_passes (denoising steps) of the whole file.
    """
    told = dict(settings or {})
    heads: list[dict[str, Any]] = [
        {"index": index, "sample": i, "seed": seed + i, "settings": told, "prompt": prompt.text}
        for index, prompt in enumerate(prompts)
        for i in range(samples)
    ]
    data = out.read_bytes() if resume and out.exists() else b""
    size = data.rfind(b"\n") + 1  # of whole lines
    lines = _read_answers(data[:size].splitlines(), heads, out)
    if advance is not None and lines:
        advance(len(lines))
    gather(None)  # all have read the file before one writes it
    own = out.open("r+b" if size else "wb") if rank_and_size()[0] == 0 else io.BytesIO()
    with own as file:
        file.truncate(size)
        file.seek(size)
        left, done = heads[len(lines) :], {}
        examples = [prompts[head["index"]].example for head in left]
        written = len(lines)
        for index, line in _shared_out(answer, examples, [head["seed"] for head in left], advance):
            done[index] = {**left[index], **line}
            while (line := done.pop(len(lines) - written, None)) is not None:  # in the order of the prompts
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                lines.append(line)
    sums = {name: sum(line.get(name, 0) for line in lines) for name in ("tokens", "forward_passes")}
    return {"answers": len(lines), **sums}


def _shared_out(
    answer: Answer,
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers of all processes, each of which answers every n-th prompt."""
    rank, size = rank_and_size()
    if size == 1:
        yield from answer(examples, seeds, advance)
        return
    for start in range(0, len(examples), SHARED * size):
        mine = range(start + rank, min(start + SHARED * size, len(examples)), size)
        found = answer([examples[index] for index in mine], [seeds[index] for index in mine], advance)
        for lines in gather([(mine[index], line) for index, line in found]):
            yield from lines


def _read_answers(texts: list[bytes], heads: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of answers, which must begin with the heads."""
    if len(texts) > len(heads):
        raise UnmaskError(f"{out}: has {len(texts):,} answers, but there are {len(heads):,} to give.")
    lines: list[dict[str, Any]] = []
    for number, (text, head) in enumerate(zip(texts, heads, strict=False), 1):
        try:
            lines.append(json.loads(text))
            changed = [name for name in head if lines[-1][name] != head[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnmaskError(f"{out} line {number}: is not an answer; remove the file.") from error
        for name in changed:
            raise UnmaskError(
                f"{out} line {number}: {name} is {lines[-1][name]!r}, now it would be {head[name]!r};"
                " resume with the same prompts and settings, or write another file."
            )
    return lines
