"""Conversation or text -> Example: token ids and source mask, from the same call of the tokenizer."""

from __future__ import annotations

import json
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import Any, Literal, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from unmask.data.encode_report import EncodeReport
from unmask.data.records import (
    Conversation,
    CustomFields,
    RecordError,
    Turn,
    check_text,
    detect_format,
    to_conversation,
)
from unmask.data.template import (
    NO_REASONING,
    ChatLayout,
    DropRecord,
    Rendered,
    Thinking,
    separator_template,
    special_aliases,
    special_strings,
)
from unmask.errors import UnmaskError, UnmaskWarning

SEPARATOR = "\n\n### Response:\n"
BATCH = 256  # records tokenized in one call
LITERALS = "held strings like special tokens, read as plain text"

Item = tuple[Any, str, int, int]
"""A record, a document, or the `RecordError` of one that cannot be read; its location; its file; its number."""


@dataclass
class Example:
    """Token ids of one sequence; `src_mask` True = instruction or context, never masked.

    `sample_id` is a hash of the record's location, -1 where it has none: the numbers of its `source` in the
    recipe, of its `file` in the source and of the `record` in the file, all from 0.
    """

    input_ids: list[int]
    src_mask: list[bool]
    sample_id: int = -1
    source: int = 0
    file: int = 0
    record: int = -1

    @property
    def supervised(self) -> int:
        """Tokens that may be masked."""
        return len(self.src_mask) - sum(self.src_mask)


def sample_id(file: int, record: int, part: int = 0) -> int:
    """Hash the location of a part of a record to 63 bits; see `of_source` for those of other sources."""
    return _mix(_mix(_mix(file + 1) ^ record) ^ part) >> 1


def of_source(sample_id: int, source: int) -> int:
    """Return what is `sample_id` in the first source for the same location in another."""
    return _mix(sample_id ^ _mix(source)) >> 1 if source else sample_id


def _mix(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


class Encoder:
    """Lays conversations out as text and encodes them: rendered once, tokenized once.

    A token belongs to the response that it starts in, and so does the end token that the template writes after
    a response. Turns after the last response are left out: a bidirectional model would see an answer's sequel.
    Add the mask token to the tokenizer first, so that its string in a text is read as plain text.

    Args:
        layout: "chat" = the tokenizer's chat template; "separator" = that of `separator_template(separator)`;
            "auto" = the tokenizer's if it has one.
        train_on: "all" supervises every assistant turn, "last" only the last one.
        end_fill: N > 1 repeats the end token, all supervised, until the last response has a multiple of N
            tokens, and leaves out what the template writes after it; 1 = as the template is.
        block_size: most tokens; a longer sequence is cut at its end (the response loses its end token) or, with
            `too_long="drop"`, dropped.
        thinking: where a response starts, see `ChatLayout`; None = what the tokenizer was trained with, else
            "template".

    Attributes:
        chat_template: The Jinja template in force; save it with the tokenizer.
        end_token_id: The id that ends a response.

    Raises:
        UnmaskError: A setting is unknown or out of range, the tokenizer lacks a chat template, an end
            token or character offsets, or the template writes no end token after a response.
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
        thinking: Thinking | None = None,
    ) -> None:
        thinking = thinking or tokenizer.init_kwargs.get("thinking") or "template"
        for name, value, known in (
            ("layout", layout, ("auto", "chat", "separator")),
            ("train_on", train_on, ("all", "last")),
            ("too_long", too_long, ("truncate", "drop")),
            ("thinking", thinking, ("off", "on", "template")),
        ):
            if value not in known:
                raise UnmaskError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        for name, size, least in (("end_fill", end_fill, 1), ("block_size", block_size, 2)):
            if size is not None and size < least:
                raise UnmaskError(f"{name} must be at least {least} token{'s' * (least > 1)}; got {size}.")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.include_system_prompt = include_system_prompt
        self.end_fill = end_fill
        self.block_size = block_size
        self.too_long = too_long
        self.thinking = thinking
        self.chat_template = _template(tokenizer, layout, separator)
        self.layout = ChatLayout(tokenizer, self.chat_template, thinking)
        self.end_token_id: int = tokenizer.convert_tokens_to_ids(self.layout.end_token)  # pyright: ignore
        if not tokenizer.is_fast:
            raise UnmaskError("the tokenizer has no character offsets; use one with a tokenizer.json.")
        self._backend: Tokenizer = cast(Any, tokenizer).backend_tokenizer

    def encode(self, conversation: Conversation) -> Example:
        """Encode one conversation.

        Raises:
            DropRecord: It cannot be used; the message is the reason.
            UnmaskError: The chat template refuses it.
        """
        [(ids, src)] = self.tokenize([self.render(conversation)])
        return self.fit(ids, src)[0]

    def prompt_example(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """Encode `turns` up to where the next response would start: the ids that training shows.

        `src_mask` False = an earlier response that training would mask: the blocks of a block-causal model start
        anew where it changes. Warns of what the template leaves out.
        """
        turns = self._filter(turns)
        trained = [self.train_on == "all" and turn.role == "assistant" and turn.train for turn in turns]
        rendered = self.layout.render_prompt(turns, trained, tools=tools)
        for note in rendered.lost:
            if note != NO_REASONING:  # which templates leave out of earlier turns on purpose
                warnings.warn(f"prompt: {note}.", UnmaskWarning, stacklevel=2)
        [(ids, src)] = self.tokenize([rendered])
        return Example(ids, src)

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation up to its last response, and find the responses to learn; raises as `encode`."""
        turns = self._filter(conversation.turns)
        while turns and turns[-1].role != "assistant":
            turns.pop()
        trained = [turn.role == "assistant" and turn.train for turn in turns]
        if self.train_on == "last":
            trained[:-1] = [False] * (len(trained) - 1)
        if not any(trained):
            raise DropRecord("no turn is to be trained on")
        rendered = self.layout.render(turns, trained, conversation.where, conversation.tools)
        if self.end_fill > 1 and trained[-1]:
            del rendered.pieces[-1]
        return rendered

    def _filter(self, turns: Sequence[Turn]) -> list[Turn]:
        return [turn for turn in turns if self.include_system_prompt or turn.role != "system"]

    def tokenize(self, texts: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        """Ids and source masks of several texts; the only place where either is made."""
        plain = iter(self._masked([text.pieces for text in texts if not text.aliased], self._backend))
        return [self._masked([t.pieces], self._aliased)[0] if t.aliased else next(plain) for t in texts]

    def _masked(
        self, rows: Sequence[list[tuple[str, bool]]], backend: Tokenizer
    ) -> list[tuple[list[int], list[bool]]]:
        backend.no_padding()  # that of a call by someone else would stay
        backend.no_truncation()
        backend.encode_special_tokens = False
        joined = ["".join(text for text, _ in pieces) for pieces in rows]
        encodings = backend.encode_batch(joined, add_special_tokens=False) if rows else []
        masked = []
        for pieces, encoding in zip(rows, encodings, strict=True):
            src, stop = [True] * len(encoding.ids), 0
            ends = [end for _, end in encoding.offsets]
            for number, (text, is_response) in enumerate(pieces):
                start, stop = stop, stop + len(text)
                if not is_response:
                    continue
                first, last = bisect_right(ends, start), bisect_right(ends, stop)
                if first < len(src) and encoding.offsets[first][0] < start and self._splits:
                    # A token of prompt and response: two parts, so that a prompt has the ids that training shows.
                    parts = self._masked([pieces[:number], pieces[number:]], backend)
                    masked.append((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]))
                    break
                src[first:last] = [False] * (last - first)
            else:
                masked.append((encoding.ids, src))
        return masked

    @cached_property
    def _splits(self) -> bool:
        """Whether the tokenizer adds nothing to the start of a text, as SentencePiece's do."""
        rows = self._masked([[(text, False)] for text in ("x\nx", "x\n", "x")], self._backend)
        return rows[0][0] == rows[1][0] + rows[2][0]

    @cached_property
    def _aliased(self) -> Tokenizer:
        """The tokenizer with its special tokens renamed, so that their strings in a text are plain text."""
        names, tree = special_aliases(self.tokenizer), json.loads(self._backend.to_str())
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = tree["model"]
        vocabulary, unknown = model.get("vocab"), model.get("unk_token")
        if isinstance(unknown, str):
            model["unk_token"] = names.get(unknown, unknown)
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(name, name): i for name, i in vocabulary.items()}
        elif vocabulary is not None:
            model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
        tree["post_processor"] = None
        return Tokenizer.from_str(json.dumps(tree))

    def fit(self, ids: list[int], src: list[bool]) -> tuple[Example, bool]:
        """Fill with end tokens and cut to `block_size`; also says whether a response was cut."""
        if self.end_fill > 1 and not src[-1]:
            length = src[::-1].index(True) if True in src else len(src)
            missing = -length % self.end_fill
            ids, src = ids + [self.end_token_id] * missing, src + [False] * missing
        size = self.block_size
        if size is None or len(ids) <= size:
            return Example(ids, src), False
        # What follows the last response ("\n" in ChatML) may be cut without harm, and so may fill.
        end = len(src) - src[::-1].index(False)
        while self.end_fill > 1 and end >= 2 and ids[end - 2 : end] == [self.end_token_id] * 2:
            end -= 1
        cut = end > size
        if cut and self.too_long == "drop":
            raise DropRecord("longer than block_size", end)
        example = Example(ids[:size], src[:size])
        if not example.supervised:
            raise DropRecord("response would vanish: the prompt alone fills block_size", src.index(False))
        return example, cut


def encode_records(
    records: Iterable[tuple[Mapping[str, Any] | RecordError, str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    on_bad_record: Literal["stop", "skip"] = "stop",
) -> tuple[list[Example], EncodeReport]:
    """Encode records with their locations (see `read_records`), and report what became of them.

    An example's `record` is its record's number, counting those left out too.

    Raises:
        UnmaskError: A record is bad input (see `to_conversation`) and `on_bad_record` is "stop".
    """
    report = EncodeReport()
    items = ((record, where, 0, number) for number, (record, where) in enumerate(records))
    way: Any = {"on_bad_record": on_bad_record, "report": report}
    return list(encode_each(items, encoder, format, custom_format, **way)), report


def encode_each(
    items: Iterable[Item],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    on_bad_record: Literal["stop", "skip"] = "stop",
    report: EncodeReport,
) -> Iterator[Example]:
    """Encode a stream of records, many in one call of the tokenizer; `report` is filled as it is read.

    Raises:
        UnmaskError: A record is bad input (see `to_conversation`) and `on_bad_record` is "stop".
    """
    items = iter(items)
    while records := list(islice(items, BATCH)):
        rows: list[tuple[str, int, int, Rendered]] = []
        for record, where, file, number in records:
            report.records += 1
            with report.sorting_out(where, on_bad_record):
                if isinstance(record, RecordError):
                    raise record
                name = detect_format(record, where, custom_format) if format == "auto" else format
                conversation = to_conversation(record, name, where=where, custom_format=custom_format)
                report.formats[name] += 1
                report.unused.update(conversation.unused)
                rows.append((where, file, number, encoder.render(conversation)))
                if conversation.turns[-1].role != "assistant":
                    report.notes["had turns after the last response, left out"] += 1
        encoded = encoder.tokenize([rendered for *_, rendered in rows])
        for (where, file, number, rendered), (ids, src) in zip(rows, encoded, strict=True):
            report.notes.update([*[LITERALS] * rendered.aliased, *rendered.lost])
            with report.sorting_out(where, on_bad_record):
                example, cut = encoder.fit(ids, src)
                report.kept += 1
                report.truncated += cut
                yield report.keep(
                    replace(example, sample_id=sample_id(file, number), file=file, record=number)
                )


def encode_documents(
    items: Iterable[Item],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    join: bool,
    long_documents: Literal["split", "cut"] = "split",
    on_bad_record: Literal["stop", "skip"] = "stop",
    shard: int = 0,
    report: EncodeReport,
) -> Iterator[Example]:
    """Encode a stream of documents for pre-training; `report` is filled as it is read.

    Special-token strings in a document are read as plain text; `src_mask` is all False. Blank documents are
    passed over.

    Args:
        join: the documents follow one another, the end token between them, in blocks of `block_size` tokens
            (the last may be shorter); else each is an example with its end token.
        long_documents: what a longer document becomes that is not joined: "split" = several examples, all
            but the last of `block_size` tokens; "cut" = one that loses its end, counted as truncated.
        shard: with its own number a joined block is known by it, as it is of several records.

    Raises:
        RecordError: A document could not be read, or is not text, and `on_bad_record` is "stop".
    """
    special, end = special_strings(tokenizer), cast(int, tokenizer.eos_token_id)
    left: list[int] | None = None  # of the joined documents, not yet in a block
    blocks = count()

    def block(ids: list[int]) -> Example:
        return report.keep(Example(ids, [False] * len(ids), sample_id(shard, next(blocks))))

    for document, where, file, number in items:
        if isinstance(document, str) and not document.strip():
            continue
        report.records += 1
        with report.sorting_out(where, on_bad_record):
            if isinstance(document, RecordError):
                raise document
            check_text(document, "text", where)
            report.kept += 1
            report.formats["text"] += 1
            report.notes.update([LITERALS] * bool(special.search(document)))
            ids = document_ids(document, tokenizer)
            if join:
                left = ids if left is None else [*left, end, *ids]
                while len(left) >= block_size:
                    yield block(left[:block_size])
                    left = left[block_size:]
            elif ids:  # a lone end token would teach nothing but where documents are empty
                ids.append(end)
                if long_documents == "cut" and len(ids) > block_size:
                    ids = ids[:block_size]
                    report.truncated += 1
                for part, start in enumerate(range(0, len(ids), block_size)):
                    piece, name = ids[start : start + block_size], sample_id(file, number, part)
                    yield report.keep(Example(piece, [False] * len(piece), name, file=file, record=number))
    if left:
        yield block(left)


def document_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a document for pre-training: special-token strings in it are plain text."""
    found = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return cast(list[int], found["input_ids"])


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
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise UnmaskError(
            f"the tokenizer has chat templates named {names} and none named default; set"
            " tokenizer.chat_template to one of them."
        )
    return tokenizer.get_chat_template()
