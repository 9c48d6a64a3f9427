"""What a model is asked: chat and raw prompts, and files of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example, document_ids
from unmask.data.files import read_records
from unmask.data.records import Conversation, CustomFields, Turn, call_text, to_conversation
from unmask.errors import UnmaskError, UnmaskNote
from unmask.shipped import find_shipped

MISSING = "?"  # takes the place of a missing answer, so that a record without one is read like any other


@dataclass(frozen=True)
class Prompt:
    """A prompt with what it was made of."""

    example: Example
    """`src_mask` False = an earlier response, which training would mask."""
    text: str
    """Its last user turn, or the raw text."""
    location: str = ""
    """File and line, for messages."""
    expected: str = ""
    """The response of the record, where it has one."""


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Make the encoder of chat prompts; raises an `UnmaskError` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; give the prompt as plain text (--raw).")
    return Encoder(tokenizer, layout="chat")


def raw_example(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Encode the beginning of a plain text; special-token strings in it are text, as in training."""
    ids = document_ids(text, tokenizer)
    return Example(ids, [False] * len(ids))


def following_ids(before: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text that follows a prompt, or the beginning of a text.

    SentencePiece-like tokenizers put a space before every text. It belongs there where a chat template writes
    it before a response: not after a line break, and not in the middle of a plain text.
    """
    ids, line, spaced = document_ids(text, tokenizer), *(document_ids(x, tokenizer) for x in ("\n", "\nx"))
    if not before.input_ids or spaced == line + document_ids("x", tokenizer):
        return ids
    if any(before.src_mask) and not str(tokenizer.decode(before.input_ids[-1:])).endswith("\n"):
        return ids
    return document_ids("\n" + text, tokenizer)[len(line) :]


def with_prefix(example: Example, prefix: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the prompt followed by `prefix`, the beginning of the response."""
    ids = following_ids(example, prefix, tokenizer) if prefix else []
    return Example(example.input_ids + ids, example.src_mask + [False] * len(ids))


def before_answer(example: Example, turns: Sequence[Turn], tools: Sequence[Any], encoder: Encoder) -> Example:
    """Add to the prompt of these turns what training shows before a plain answer: an empty think block."""
    asked = Conversation((*turns, Turn("assistant", MISSING)), "the prompt", tuple(tools))
    response = encoder.encode(asked).input_ids[len(example.input_ids) :]
    size = response.index(encoder.end_token_id) - len(document_ids(MISSING, encoder.tokenizer))
    return Example(example.input_ids + response[:size], example.src_mask + [False] * size)


def make_prompts(
    records: Iterable[tuple[Mapping[str, Any], str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    answered: bool = True,
    system: str | None = None,
    prefix: str = "",
    to_answer: bool = False,
) -> list[Prompt]:
    """Make the prompt of each record: all up to where training lets its last response start.

    Warns of fields that no prompt is made of, and of turns that the chat template leaves out.

    Args:
        records: see `read_records`; format, custom_format: see `to_conversation`.
        answered: every record has a response; otherwise one that ends without it is asked for the next.
        system: a system prompt for all that have none.
        prefix: the beginning of every response.
        to_answer: go on to where a plain answer starts: after an empty think block, if training has one.

    Raises:
        UnmaskError: a record cannot be used, or its prompt is empty.
    """
    prompts = []
    for record, where in records:
        read = to_conversation(record, format, where=where, custom_format=custom_format, answered=answered)
        if read.unused:
            warnings.warn(f"prompts: fields not used: {', '.join(read.unused)}.", UnmaskNote, stacklevel=2)
        turns = list(read.turns)
        while answered and turns[-1].role != "assistant":
            turns.pop()
        expected = call_text(turns.pop()) if turns[-1].role == "assistant" else ""
        text = next((turn for turn in reversed(turns) if turn.role == "user"), turns[0]).content
        if not text.strip():
            raise UnmaskError(f"{where} is empty; say something, or generate from nothing with --raw.")
        if system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", system))
        example = encoder.prompt_example(turns, read.tools)
        if to_answer:
            example = before_answer(example, turns, read.tools, encoder)
        prompts.append(Prompt(with_prefix(example, prefix, encoder.tokenizer), text, where, expected))
    return prompts


def prompt_example(
    tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool = False, prefix: str = "", **options: Any
) -> Example:
    """Encode one prompt: what a user says, or with `raw` the beginning of a text; see `make_prompts`."""
    if raw:
        return with_prefix(raw_example(tokenizer, text), prefix, tokenizer)
    asked, encoder = [({"prompt": text}, "the prompt")], chat_encoder(tokenizer)
    [prompt] = make_prompts(asked, encoder, answered=False, prefix=prefix, **options)
    return prompt.example


def read_prompts(
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    prefix: str = "",
    longest: int | None = None,
    **options: Any,
) -> list[Prompt]:
    """Read prompts: records of any known format, or a `.txt` file with one prompt a line, blank ones skipped.

    Args:
        raw: texts to continue without the chat template: lines, or the field "prompt" or "text".
        longest: tokens of a prompt at most.
        prefix: see `make_prompts`.
        **options: see `make_prompts`.

    Raises:
        UnmaskError: the file or a record cannot be used, a prompt is empty or too long, or there is none.
    """
    path = Path(find_shipped(file)).expanduser()
    records = _lines(path) if path.suffix.lower() == ".txt" and path.is_file() else read_records(file)
    if raw:
        texts = [(_raw_text(record, where), where) for record, where in records]
        prompts = [
            Prompt(prompt_example(tokenizer, text, raw=True, prefix=prefix), text, where)
            for text, where in texts
        ]
    else:
        prompts = make_prompts(records, chat_encoder(tokenizer), answered=False, prefix=prefix, **options)
    if not prompts:
        raise UnmaskError(f"{file}: there is no prompt in it.")
    for prompt in prompts:
        if longest is not None and (size := len(prompt.example.input_ids)) > longest:
            raise UnmaskError(
                f"{prompt.location}: a prompt of {size} tokens; max_new_tokens leaves {longest} of the model's"
                " positions for it: shorten one of them."
            )
    return prompts


def _raw_text(record: Mapping[str, Any], where: str) -> str:
    if isinstance(text := record.get("prompt", record.get("text")), str):
        return text
    raise UnmaskError(
        f"{where}: with --raw a text is read from the field 'prompt' or 'text'; fields here:"
        f" {', '.join(map(str, record))}."
    )


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a text file that are not blank, as records, with their locations."""
    for text, _ in read_records(path, text=True):
        for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
            if line.strip():
                yield {"prompt": line}, f"{path.name} line {number}"
