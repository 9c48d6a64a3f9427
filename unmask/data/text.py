"""Plain text -> Example, for pre-training: documents joined into blocks, or each an example of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import BadRecord, RecordError, check_text
from unmask.data.encode import PART_BIT, SOURCE_BIT, EncodeReport, Example, check_block_size, one_of
from unmask.data.template import special_strings
from unmask.errors import UnmaskError


def usable_documents(
    documents: Iterable[tuple[str | BadRecord, str, int]],
    tokenizer: PreTrainedTokenizerBase,
    report: EncodeReport,
    on_bad_record: Literal["stop", "skip"] = "stop",
) -> Iterator[tuple[str, int]]:
    """Yield text and sample id of (document, place, sample id), and count in `report` what became of them.

    Raises:
        RecordError: A document could not be read, or is no text, and `on_bad_record` is "stop".
    """
    special = special_strings(tokenizer)
    for document, where, sample_id in documents:
        report.records += 1
        try:
            if isinstance(document, BadRecord):
                raise document.error(where)
            check_text(document, "text", where)
        except RecordError as error:
            if on_bad_record == "stop":
                raise
            report.skip(error)
            continue
        report.kept += 1
        report.formats["text"] = report.formats.get("text", 0) + 1
        report.with_special_strings += special.search(document) is not None
        yield document, sample_id


def pack_text(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[Example]:
    """Join documents with the end token between them and cut them into blocks for pre-training.

    Every block has `block_size` tokens but the last, which may be shorter; `src_mask` is all False.
    Special-token strings in a document are read as plain text.

    Raises:
        UnmaskError: `block_size` is below 2, the tokenizer has no end token, or there is no text.
    """
    check_block_size(block_size)
    if tokenizer.eos_token_id is None:
        raise UnmaskError("the tokenizer has no end token (eos_token) to put between documents.")
    numbered = ((document, -1) for document in documents)
    return _cut(numbered, tokenizer, TextBlocks(cast(int, tokenizer.eos_token_id), block_size))


class TextBlocks:
    """Joins tokenized documents into blocks, as `pack_text` says; what it carries on is here to be saved.

    Attributes:
        left: tokens that no block has yet; None before the first document.
        number: blocks so far.
    """

    def __init__(self, end_token_id: int, block_size: int) -> None:
        self.end_token_id = end_token_id
        self.block_size = block_size
        self.left: list[int] | None = None
        self.number = 0

    def add(self, ids: list[int], sample_id: int = -1) -> Iterator[Example]:
        """Yield the blocks that are full with this document, whose own number does not matter."""
        joined = ids if self.left is None else [*self.left, self.end_token_id, *ids]
        whole = len(joined) - len(joined) % self.block_size
        self.left = joined[whole:]
        for start in range(0, whole, self.block_size):
            self.number += 1
            block = joined[start : start + self.block_size]
            yield Example(block, [False] * len(block), self.number - 1)

    def finish(self) -> Iterator[Example]:
        """Yield the last block, which may be shorter.

        Raises:
            UnmaskError: There is no text at all.
        """
        block, self.left = self.left, []
        if block:
            self.number += 1
            yield Example(block, [False] * len(block), self.number - 1)
        elif self.number == 0:
            raise UnmaskError("there is no text to pack: the documents are empty.")


def split_documents(
    documents: Iterable[tuple[str, int]],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    long_documents: Literal["split", "cut"] = "split",
    *,
    report: EncodeReport | None = None,
) -> Iterator[Example]:
    """Encode each (document, sample id) with its end token as an example of its own, for packed pre-training.

    One longer than `block_size` becomes several examples ("split": every part but the last has
    `block_size` tokens, the end token comes in the last) or loses its end ("cut", counted as truncated).
    `src_mask` is all False; the number of a part is in its sample id from `PART_BIT` up.
    `report` is filled with the tokens as the documents are read. Special-token strings in a document are
    read as plain text.

    Raises:
        UnmaskError: A setting is unknown or out of range, the tokenizer has no end token, or there is no
            text.
    """
    check_block_size(block_size)
    one_of("long_documents", long_documents, ("split", "cut"))
    if tokenizer.eos_token_id is None:
        raise UnmaskError("the tokenizer has no end token (eos_token) to end documents with.")
    parts = TextParts(cast(int, tokenizer.eos_token_id), block_size, cut=long_documents == "cut")
    if report is not None:
        parts.report = report
    return _cut(documents, tokenizer, parts)


class TextParts:
    """Cuts tokenized documents into examples of their own, as `split_documents` says.

    Attributes:
        number: examples so far.
        report: filled with the tokens.
    """

    def __init__(self, end_token_id: int, block_size: int, *, cut: bool = False) -> None:
        self.end_token_id = end_token_id
        self.block_size = block_size
        self.cut = cut
        self.number = 0
        self.report = EncodeReport()

    def add(self, ids: list[int], sample_id: int) -> Iterator[Example]:
        """Yield the examples of this document."""
        if not ids:
            return  # a lone end token would teach nothing but where documents are empty
        ids = [*ids, self.end_token_id]
        if self.cut and len(ids) > self.block_size:
            ids = ids[: self.block_size]
            self.report.truncated += 1
        self.report.tokens += len(ids)
        self.report.supervised_tokens += len(ids)
        source = sample_id >> SOURCE_BIT
        for number, start in enumerate(range(0, len(ids), self.block_size)):
            part = ids[start : start + self.block_size]
            self.number += 1
            yield Example(part, [False] * len(part), number << PART_BIT | sample_id, source)

    def finish(self) -> Iterator[Example]:
        """Yield nothing more.

        Raises:
            UnmaskError: There is no text at all.
        """
        if self.number == 0:
            raise UnmaskError("there is no text to pack: the documents are empty.")
        yield from ()


def document_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a document for pre-training: special-token strings in it are plain text."""
    return tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]  # pyright: ignore[reportReturnType]


def _cut(
    documents: Iterable[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, way: TextBlocks | TextParts
) -> Iterator[Example]:
    for document, sample_id in documents:
        yield from way.add(document_ids(document, tokenizer), sample_id)
    yield from way.finish()
