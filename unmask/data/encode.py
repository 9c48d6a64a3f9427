"""Conversation or plain text -> Example: token ids and source mask, appended by the same helper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import (
    Conversation,
    CustomFields,
    Turn,
    detect_format,
    to_conversation,
)
from unmask.data.template import ChatLayout, DropRecord, Span, separator_template
from unmask.errors import UnmaskError

__all__ = [
    "DropRecord",
    "EncodeReport",
    "Encoder",
    "Example",
    "encode_records",
    "pack_text",
    "separator_template",
]

SEPARATOR = "\n\n### Response:\n"
VANISHES = "response would vanish: the prompt alone fills block_size"
TOO_LONG = "longer than block_size"
UNTRAINED = "no turn is to be trained on"
BATCH = 256  # records tokenized in one call


@dataclass
class Example:
    """Token ids of one sequence; `src_mask` True = instruction or context, never masked.

    `sample_id` is the record's number in its source, from 0; -1 where there is none.
    """

    input_ids: list[int]
    src_mask: list[bool]
    sample_id: int = -1

    @property
    def supervised(self) -> int:
        """Tokens that may be masked."""
        return len(self.src_mask) - sum(self.src_mask)


@dataclass
class EncodeReport:
    """What became of the records. `dropped` maps a reason to (count, first place)."""

    records: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    with_special_strings: int = 0  # contents held strings like "<|im_end|>": read as plain text
    with_turns_after: int = 0  # turns after the last response were left out

    def drop(self, reason: str, where: str) -> None:
        """Count one record as dropped."""
        dropped, first = self.dropped.get(reason, (0, where))
        self.dropped[reason] = (dropped + 1, first)


class Encoder:
    """Lays conversations out as text and encodes them.

    Every layout is a chat template. "chat" takes the tokenizer's own, "separator" the plain one of
    `separator_template(separator)`, "auto" the tokenizer's own if it has one. `train_on` "all"
    supervises every assistant turn, "last" only the last one. The end token that the template
    writes after a response belongs to the response.

    With `end_fill` N > 1 the end token is repeated, all supervised, until the last response has a
    multiple of N tokens, and what the template writes after the end token is left out; 1 renders
    the template as it is. A sequence longer than `block_size` tokens is cut at its end (the
    response loses its end token) or, with `too_long="drop"`, dropped. Turns after the last
    response are left out: a bidirectional model would see an answer's sequel.

    Add the mask token to the tokenizer before making an Encoder, so that its string in a text is
    known to be one to read as plain text.

    Attributes:
        chat_template: The Jinja template in force; save it with the tokenizer.
        end_token_id: The id that ends a response.

    Raises:
        UnmaskError: A setting is unknown or out of range, the tokenizer lacks a chat template or an
            end token, or the template writes no end token after a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: Literal["auto", "chat", "separator"] = "auto",
        separator: str = SEPARATOR,
        train_on: Literal["all", "last"] = "all",
        include_system_prompt: bool = True,
        end_fill: int = 1,
        block_size: int | None = None,
        too_long: Literal["truncate", "drop"] = "truncate",
    ) -> None:
        _one_of("layout", layout, ("auto", "chat", "separator"))
        _one_of("train_on", train_on, ("all", "last"))
        _one_of("too_long", too_long, ("truncate", "drop"))
        if end_fill < 1:
            raise UnmaskError(f"end_fill must be at least 1 token; got {end_fill}.")
        if block_size is not None:
            _check_block_size(block_size)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.include_system_prompt = include_system_prompt
        self.end_fill = end_fill
        self.block_size = block_size
        self.too_long = too_long
        self.chat_template = _template(tokenizer, layout, separator)
        self._layout = ChatLayout(tokenizer, self.chat_template)
        self.end_token_id: int = tokenizer.convert_tokens_to_ids(self._layout.end_token)  # pyright: ignore

    def encode(self, conversation: Conversation, sample_id: int = -1) -> Example:
        """Encode one conversation.

        Raises:
            DropRecord: It cannot be used; the message is the reason.
            UnmaskError: The chat template refuses it.
        """
        spans = self._spans(conversation)
        [(ids, src)] = self._tokenize([spans])
        example, _ = self._fit(ids, src)
        example.sample_id = sample_id
        return example

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Encode `turns` up to where the next response would start: the ids that training shows."""
        spans = self._layout.prompt_spans(self._filter(turns))
        [(ids, _)] = self._tokenize([spans])
        return ids

    def _filter(self, turns: Sequence[Turn]) -> list[Turn]:
        return [turn for turn in turns if self.include_system_prompt or turn.role != "system"]

    def _spans(self, conversation: Conversation) -> list[Span]:
        turns = self._filter(conversation.turns)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        trained = [turn.role == "assistant" and turn.train for turn in turns]
        if self.train_on == "last":
            trained[:-1] = [False] * (len(trained) - 1)
        if not any(trained):
            raise DropRecord(UNTRAINED)
        spans = self._layout.spans(turns, trained, conversation.where)
        if self.end_fill > 1 and trained[-1] and not spans[-1].is_response:
            spans.pop()
        return spans

    def _tokenize(self, sequences: Sequence[list[Span]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and source masks of several sequences; the only place where either is appended."""
        pools: dict[bool, list[str]] = {False: [], True: []}
        for span in (span for spans in sequences for span in spans):
            pools[span.literal].append(span.text)
        ids = {literal: iter(self._ids(texts, literal)) for literal, texts in pools.items()}
        encoded = []
        for spans in sequences:
            input_ids: list[int] = []
            src_mask: list[bool] = []
            for span in spans:
                piece = next(ids[span.literal])
                input_ids += piece
                src_mask += [not span.is_response] * len(piece)
            encoded.append((input_ids, src_mask))
        return encoded

    def _ids(self, texts: list[str], literal: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            split_special_tokens=literal,
            verbose=False,
        )["input_ids"]  # pyright: ignore[reportReturnType]

    def _fit(self, ids: list[int], src: list[bool]) -> tuple[Example, bool]:
        """Fill with end tokens and cut to `block_size`; also says whether a response was cut."""
        if self.end_fill > 1 and not src[-1]:
            length = src[::-1].index(True) if True in src else len(src)
            missing = -length % self.end_fill
            ids, src = ids + [self.end_token_id] * missing, src + [False] * missing
        size = self.block_size
        if size is None or len(ids) <= size:
            return Example(ids, src), False
        # What follows the last response ("\n" in ChatML) may be cut without harm.
        cut = len(src) - src[::-1].index(False) > size
        if cut and self.too_long == "drop":
            raise DropRecord(TOO_LONG)
        example = Example(ids[:size], src[:size])
        if not example.supervised:
            raise DropRecord(VANISHES)
        return example, cut


def encode_records(
    records: Iterable[tuple[Mapping[str, Any], str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Encode records with their places (see `read_records`), and report what became of them.

    An example's `sample_id` is its record's number, counting dropped ones too.

    Raises:
        UnmaskError: A record is bad input (see `to_conversation`).
    """
    examples: list[Example] = []
    report = EncodeReport()
    records = iter(records)
    while batch := list(islice(records, BATCH)):
        rows = []
        for record, where in batch:
            sample_id = report.records
            report.records += 1
            name = detect_format(record, where, custom_format) if format == "auto" else format
            report.formats[name] = report.formats.get(name, 0) + 1
            conversation = to_conversation(record, name, where=where, custom_format=custom_format)
            report.with_turns_after += conversation.turns[-1].role != "assistant"
            try:
                rows.append((sample_id, where, encoder._spans(conversation)))
            except DropRecord as reason:
                report.drop(str(reason), where)
        encoded = encoder._tokenize([spans for _, _, spans in rows])
        for (sample_id, where, spans), (ids, src) in zip(rows, encoded, strict=True):
            report.with_special_strings += any(span.literal for span in spans)
            try:
                example, cut = encoder._fit(ids, src)
            except DropRecord as reason:
                report.drop(str(reason), where)
                continue
            example.sample_id = sample_id
            examples.append(example)
            report.kept += 1
            report.truncated += cut
            report.tokens += len(example.input_ids)
            report.supervised_tokens += example.supervised
    return examples, report


def pack_text(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[Example]:
    """Join documents with the end token between them and cut them into blocks for pre-training.

    Every block has `block_size` tokens but the last, which may be shorter; `src_mask` is all False.
    Special-token strings in a document are read as plain text.

    Raises:
        UnmaskError: `block_size` is below 2, the tokenizer has no end token, or there is no text.
    """
    _check_block_size(block_size)
    if tokenizer.eos_token_id is None:
        raise UnmaskError("the tokenizer has no end token (eos_token) to put between documents.")
    return _blocks(documents, tokenizer, block_size)


def _blocks(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[Example]:
    left: list[int] = []
    number = 0
    for index, document in enumerate(documents):
        if index:
            left.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        left += tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        whole = len(left) - len(left) % block_size
        for start in range(0, whole, block_size):
            ids = left[start : start + block_size]
            yield Example(ids, [False] * block_size, number)
            number += 1
        left = left[whole:]
    if left:
        yield Example(left, [False] * len(left), number)
    elif number == 0:
        raise UnmaskError("there is no text to pack: the documents are empty.")


def _template(tokenizer: PreTrainedTokenizerBase, layout: str, separator: str) -> str:
    if layout == "separator" or (layout == "auto" and not tokenizer.chat_template):
        if tokenizer.eos_token is None:
            raise UnmaskError(
                "the tokenizer has no end token (eos_token) to end a response with; set it: "
                'tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"}).'
            )
        return separator_template(separator)
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; use layout=separator.")
    return tokenizer.get_chat_template()


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnmaskError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise UnmaskError(f"block_size must be at least 2 tokens; got {block_size}.")
