"""A file of prompts -> a file of answers, written as they come, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.data.records import ROLES, RecordError, Turn, detect_format, to_conversation
from unmask.data.encode import Example
from unmask.data.files import read_records
from unmask.errors import UnmaskError
from unmask.generation.complete import chat_example, chat_turns, complete, raw_example

ASKED = "?"  # stands where the answer would, so that a record without one is read like any other
_LISTS = ("messages", "conversations")
_ANSWERS = {"prompt": "completion", "instruction": "output"}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it, its last user turn (or raw text) as a person does, and its place."""

    example: Example
    text: str
    where: str


def read_prompts(
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    system: str | None = None,
) -> list[Prompt]:
    """Read prompts: records of any known format, or a text file with one prompt a line.

    Of a record everything before its last response is the prompt; a record may lack that response. Blank
    lines of a text file are passed over.

    Args:
        raw: texts to continue without the chat template: lines, or the field "prompt" or "text".
        system: a system prompt for all that have none.

    Raises:
        UnmaskError: the file or a record cannot be used, a prompt is empty, or there is none.
    """
    path, prompts = Path(file).expanduser(), []
    if path.suffix.lower() == ".txt" and path.is_file():
        for text, where in _lines(path):
            example = (
                raw_example(tokenizer, text) if raw else chat_example(tokenizer, chat_turns(text, system))
            )
            prompts.append(Prompt(example, text, where))
    else:
        for record, where in read_records(file):
            prompts.append(
                _raw_record(record, where, tokenizer) if raw else _record(record, where, tokenizer, system)
            )
    if not prompts:
        raise UnmaskError(f"{file}: there is no prompt in it.")
    return prompts


def prompt_turns(record: Mapping[str, Any], where: str) -> tuple[list[Turn], tuple[Mapping[str, Any], ...]]:
    """Read the turns of a record up to its last response, which it may lack, and its tools.

    Raises:
        UnmaskError: no known format fits, or a field cannot be used.
    """
    for name in _LISTS:
        turns = record.get(name)
        if isinstance(turns, list) and not (turns and _role(turns[-1]) == "assistant"):
            record = {**record, name: [*turns, {"role": "assistant", "content": ASKED}]}
            break
    else:
        for asked, answer in _ANSWERS.items():
            if record.get(asked) is None or record.get(answer) or record.get("response"):
                continue
            several = isinstance(record[asked], list)
            record = {**record, answer: [{"role": "assistant", "content": ASKED}] if several else ASKED}
            break
    try:
        name = detect_format(record, where)
    except RecordError as error:
        raise UnmaskError(
            f"{where}: no known format has these fields: {', '.join(map(str, record))}; a prompt is read from"
            " instruction, prompt, messages or conversations; rename the field that holds it."
        ) from error
    conversation = to_conversation(record, name, where=where)
    return list(conversation.turns[:-1]), conversation.tools


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> None:
    """Find out whether every prompt has room for its answer.

    Raises:
        UnmaskError: names the first prompt that has not.
    """
    for prompt in prompts:
        size = len(prompt.example.input_ids)
        if size + max_new_tokens > positions:
            raise UnmaskError(
                f"{prompt.where}: a prompt of {size} tokens and max_new_tokens = {max_new_tokens} need more"
                f" than the model's {positions} positions; shorten one of them."
            )


Answer = Callable[[Sequence[Example], Sequence[int], Callable[[int], None] | None], list[dict[str, Any]]]
"""(prompts, their seeds, a function told how many are done) -> what the line of each says."""


def generated(model: Any, tokenizer: PreTrainedTokenizerBase, *, prefix: str = "", **settings: Any) -> Answer:
    """Answer by generation: response, tokens, forwards.

    Args:
        prefix: what the prompts already begin the response with, see `begun`.
        **settings: see `complete`.
    """

    def answer(
        examples: Sequence[Example], seeds: Sequence[int], advance: Callable[[int], None] | None
    ) -> list[dict[str, Any]]:
        done = complete(model, tokenizer, examples, seed=list(seeds), advance=advance, **settings)
        return [
            {
                "response": prefix + one.text,
                "tokens": len(one.ids),
                "forwards": one.forwards,
                "tokens_per_forward": round(one.tokens_per_forward, 4),
            }
            for one in done
        ]

    return answer


def answer_file(
    answer: Answer,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    samples: int = 1,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    together: int = 64,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Answer prompts and write one JSON line an answer, in the order of the prompts, as they are done.

    Args:
        samples: answers to each prompt; answer i is drawn from seed + i.
        resume: go on after the lines that `out` has; they must be of these prompts and settings.
        settings: said in every line.
        together: answers between two writes.
        advance: told the number of answers done, those already there first.

    Returns:
        answers, tokens and forwards of the whole file.

    Raises:
        UnmaskError: `out` is of other prompts or settings, or cannot be written.
    """
    heads = [
        {
            "index": index,
            "sample": sample,
            "seed": seed + sample,
            "settings": dict(settings or {}),
            "prompt": prompt.text,
        }
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    totals = {"answers": 0, "tokens": 0, "forwards": 0}
    done, size = _kept(out, heads, totals) if resume else (0, 0)
    if advance is not None and done:
        advance(done)
    with out.open("r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        for start in range(done, len(heads), together):
            chosen = heads[start : start + together]
            examples = [prompts[head["index"]].example for head in chosen]
            answers = answer(examples, [head["seed"] for head in chosen], advance)
            for head, said in zip(chosen, answers, strict=True):
                line = {**head, **said}
                _count(line, totals)
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
    return totals


def check_out(out: Path, resume: bool) -> None:
    """Find out whether answers can be written, before the model is loaded.

    Raises:
        UnmaskError: says what is in the way.
    """
    if out.is_dir():
        raise UnmaskError(f"--out: {out} is a folder; name a file in it, such as {out / 'answers.jsonl'}.")
    if out.exists() and not resume:
        raise UnmaskError(f"--out: {out} exists already; --resume goes on with it, or remove it.")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UnmaskError(f"--out: {out}: there is no folder {out.parent}; make it first.")
    if not os.access(out if out.exists() else parent, os.W_OK):
        raise UnmaskError(f"--out: {out} cannot be written to.")


def _kept(out: Path, heads: Sequence[Mapping[str, Any]], totals: dict[str, int]) -> tuple[int, int]:
    """Answers that `out` holds, and their bytes; a line that was cut off is none."""
    if not out.exists():
        return 0, 0
    data = out.read_bytes()
    size = data.rfind(b"\n") + 1
    lines = data[:size].splitlines()
    if len(lines) > len(heads):
        raise UnmaskError(f"{out}: has {len(lines):,} answers, but there are {len(heads):,} to give.")
    for number, (text, head) in enumerate(zip(lines, heads, strict=False), 1):
        try:
            line = json.loads(text)
            differing = _differing(head, line)
            _count(line, totals)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UnmaskError(f"{out} line {number}: is no answer; remove the file.") from error
        if differing:
            name, was, now = differing[0]
            raise UnmaskError(
                f"{out} line {number}: {name} is {was!r}, now it would be {now!r}; resume with the same"
                " prompts and settings, or write another file."
            )
    return len(lines), size


def _differing(head: Mapping[str, Any], line: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What a line says other than it would say now: name, before, now."""
    then, now = ({**one, **one["settings"], "settings": None} for one in (line, head))
    names = (*head, *line["settings"], *head["settings"])
    return [(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)]


def _count(line: Mapping[str, Any], totals: dict[str, int]) -> None:
    totals["answers"] += 1
    totals["tokens"] += line.get("tokens", 0)
    totals["forwards"] += line.get("forwards", 0)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, with their places."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{path.name} line {number}"
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnmaskError(
                f"{where}: not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8."
            ) from error
        if text.strip():
            yield text, where


def _record(
    record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, system: str | None
) -> Prompt:
    turns, tools = prompt_turns(record, where)
    asked = next(turn.content for turn in reversed(turns) if turn.role == "user")
    if not asked.strip():
        raise UnmaskError(f"{where}: the prompt is empty.")
    if system is not None and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    return Prompt(chat_example(tokenizer, turns, tools), asked, where)


def _raw_record(record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    text = record.get("prompt", record.get("text"))
    if not isinstance(text, str):
        fields = ", ".join(map(str, record))
        raise UnmaskError(
            f"{where}: with --raw a text is read from the field 'prompt' or 'text'; fields here: {fields}."
        )
    if not text:
        raise UnmaskError(f"{where}: the prompt is empty.")
    return Prompt(raw_example(tokenizer, text), text, where)


def _role(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return "assistant"  # left to be refused with its place
    name = message.get("role", message.get("from"))
    return ROLES.get(name) if isinstance(name, str) else None
