"""Conversation -> Example: token ids and source mask, appended by the same helper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmask.data.conversation import (
    BadRecord,
    Conversation,
    CustomFields,
    RecordError,
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
    "separator_template",
]

SEPARATOR = "\n\n### Response:\n"
VANISHES = "response would vanish: the prompt alone fills block_size"
TOO_LONG = "longer than block_size"
UNTRAINED = "no turn is to be trained on"
BATCH = 256  # records tokenized in one call
SOURCE_BIT = 40  # of a sample id: below is the record's number in its source, from here up the source
PART_BIT = 48  # from here up the part of a record that gives several examples
SOURCES = 1 << PART_BIT - SOURCE_BIT


@dataclass
class Example:
    """Token ids of one sequence; `src_mask` True = instruction or context, never masked.

    `sample_id` is the record's number in its source (see `files.record_id`), from 0, with the source in the
    bits from `SOURCE_BIT` up and the part of the record from `PART_BIT` up; -1 where there is none. `source`
    is the number of the source in the recipe, `epoch` the pass over it in a stream, -1 = the run's own.
    """

    input_ids: list[int]
    src_mask: list[bool]
    sample_id: int = -1
    source: int = 0
    epoch: int = -1

    @property
    def supervised(self) -> int:
        """Tokens that may be masked."""
        return len(self.src_mask) - sum(self.src_mask)


@dataclass
class EncodeReport:
    """What became of the records. `dropped` and `skipped` map a reason to (count, first place).

    Dropped: sound, but of no use under these settings. Skipped: bad input, under on_bad_record="skip".
    """

    records: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: int = 0
    supervised_tokens: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    with_special_strings: int = 0  # contents held strings like "<|im_end|>": read as plain text
    with_turns_after: int = 0  # turns after the last response were left out
    with_tools_unshown: int = 0  # had a list of tools that the template has no place for

    def drop(self, reason: str, where: str) -> None:
        """Count one record as dropped."""
        dropped, first = self.dropped.get(reason, (0, where))
        self.dropped[reason] = (dropped + 1, first)

    def skip(self, error: RecordError) -> None:
        """Count one record as skipped."""
        skipped, first = self.skipped.get(error.counted, (0, error.where))
        self.skipped[error.counted] = (skipped + 1, first)

    def left_out(self) -> list[str]:
        """Say what was dropped and skipped, and why: "2 skipped: not valid JSON (first: x.jsonl line 4)"."""
        return [
            f"{count:,} {what}: {reason} (first: {where})"
            for what, reasons in (("dropped", self.dropped), ("skipped", self.skipped))
            for reason, (count, where) in reasons.items()
        ]

    def merge(self, other: EncodeReport) -> None:
        """Add what became of later records."""
        for name in (item.name for item in fields(EncodeReport)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not isinstance(theirs, dict):
                setattr(self, name, mine + theirs)
                continue
            for key, value in theirs.items():
                if isinstance(value, tuple):  # how often, and where first
                    count, first = mine.get(key, (0, value[1]))
                    mine[key] = (count + value[0], first)
                else:
                    mine[key] = mine.get(key, 0) + value

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> EncodeReport:
        """Read back a report that was written as JSON, in which pairs are lists."""
        report = cls(**tree)
        for counts in (report.dropped, report.skipped):
            counts.update({reason: tuple(pair) for reason, pair in counts.items()})  # pyright: ignore
        return report


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
        shows_tools: Whether the template has a place for a conversation's list of tools.

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
        one_of("layout", layout, ("auto", "chat", "separator"))
        one_of("train_on", train_on, ("all", "last"))
        one_of("too_long", too_long, ("truncate", "drop"))
        if end_fill < 1:
            raise UnmaskError(f"end_fill must be at least 1 token; got {end_fill}.")
        if block_size is not None:
            check_block_size(block_size)
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.include_system_prompt = include_system_prompt
        self.end_fill = end_fill
        self.block_size = block_size
        self.too_long = too_long
        self.chat_template = _template(tokenizer, layout, separator)
        self._layout = ChatLayout(tokenizer, self.chat_template)
        self._backend = _backend(tokenizer)
        self.shows_tools = self._layout.shows_tools
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

    def encode_prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Encode `turns` up to where the next response would start: the ids that training shows."""
        return self.prompt_example(turns, tools).input_ids

    def prompt_example(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """Encode as `encode_prompt`; `src_mask` False = an earlier response that training would mask.

        The blocks of a block-causal model start anew where it changes.
        """
        turns = self._filter(turns)
        trained = [self.train_on == "all" and turn.role == "assistant" and turn.train for turn in turns]
        [(ids, src)] = self._tokenize([self._layout.prompt_spans(turns, tools=tools, trained=trained)])
        return Example(ids, src)

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
        spans = self._layout.spans(turns, trained, conversation.where, conversation.tools)
        if self.end_fill > 1 and trained[-1] and not spans[-1].is_response:
            spans.pop()
        return spans

    def _tokenize(self, sequences: Sequence[list[Span]]) -> list[tuple[list[int], list[bool]]]:
        """Ids and source masks of several sequences; the only place where either is appended."""
        pools: dict[bool, dict[str, None]] = {False: {}, True: {}}  # each text once, in order
        for span in (span for spans in sequences for span in spans):
            pools[span.literal][span.text] = None
        ids = {
            literal: dict(zip(texts, self._ids(list(texts), literal), strict=True))
            for literal, texts in pools.items()
        }
        encoded = []
        for spans in sequences:
            input_ids: list[int] = []
            src_mask: list[bool] = []
            for span in spans:
                piece = ids[span.literal][span.text]
                input_ids += piece
                src_mask += [not span.is_response] * len(piece)
            encoded.append((input_ids, src_mask))
        return encoded

    def _ids(self, texts: list[str], literal: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                split_special_tokens=literal,
                verbose=False,
            )["input_ids"]  # pyright: ignore[reportReturnType]
        self._backend.no_padding()  # that of a call by someone else would stay
        self._backend.no_truncation()
        self._backend.encode_special_tokens = literal
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

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
    records: Iterable[tuple[Mapping[str, Any] | BadRecord, str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    on_bad_record: Literal["stop", "skip"] = "stop",
    source: int = 0,
) -> tuple[list[Example], EncodeReport]:
    """Encode records with their places (see `read_records`), and report what became of them.

    An example's `sample_id` is its record's number, counting those left out too, with `source` in
    the bits from `SOURCE_BIT` up.

    Raises:
        UnmaskError: A record is bad input (see `to_conversation`) and `on_bad_record` is "stop".
    """
    report = EncodeReport()
    items = ((record, where, source << SOURCE_BIT | number) for number, (record, where) in enumerate(records))
    examples = encode_each(items, encoder, format, custom_format, on_bad_record=on_bad_record, report=report)
    return list(examples), report


def encode_each(
    items: Iterable[tuple[Mapping[str, Any] | BadRecord, str, int]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    on_bad_record: Literal["stop", "skip"] = "stop",
    report: EncodeReport | None = None,
    batch: int = BATCH,
) -> Iterator[Example]:
    """Encode a stream of (record, place, sample id), `batch` of them in one call of the tokenizer.

    `report` is filled as the stream is read. The `source` of an example is in its sample id.

    Raises:
        UnmaskError: A record is bad input (see `to_conversation`) and `on_bad_record` is "stop".
    """
    report = EncodeReport() if report is None else report
    items = iter(items)
    while records := list(islice(items, batch)):
        rows = []
        for record, where, sample_id in records:
            report.records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record.error(where)
                name = detect_format(record, where, custom_format) if format == "auto" else format
                conversation = to_conversation(record, name, where=where, custom_format=custom_format)
                report.formats[name] = report.formats.get(name, 0) + 1
                rows.append((sample_id, where, encoder._spans(conversation)))
                report.with_turns_after += conversation.turns[-1].role != "assistant"
                report.with_tools_unshown += bool(conversation.tools) and not encoder.shows_tools
            except DropRecord as reason:
                report.drop(str(reason), where)
            except RecordError as error:
                if on_bad_record == "stop":
                    raise
                report.skip(error)
        encoded = encoder._tokenize([spans for _, _, spans in rows])
        for (sample_id, where, spans), (ids, src) in zip(rows, encoded, strict=True):
            report.with_special_strings += any(span.literal for span in spans)
            try:
                example, cut = encoder._fit(ids, src)
            except DropRecord as reason:
                report.drop(str(reason), where)
                continue
            example.sample_id = sample_id
            example.source = sample_id >> SOURCE_BIT
            report.kept += 1
            report.truncated += cut
            report.tokens += len(example.input_ids)
            report.supervised_tokens += example.supervised
            yield example


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


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer without its wrapping, which costs a fifth of the time; None if that does more."""
    plain = PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain):
        return None
    own = ("__call__", "_encode_plus")
    same = all(getattr(type(tokenizer), name) is getattr(plain, name) for name in own)
    return tokenizer.backend_tokenizer if same else None


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnmaskError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise UnmaskError(f"block_size must be at least 2 tokens; got {block_size}.")
