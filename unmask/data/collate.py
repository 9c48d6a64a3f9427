"""Examples -> rows -> a batch of tensors; the only place that packs and pads.

Packed rows are a function of the examples and of the row's length alone: no seed, no device, no number of
processes. A window of examples is packed by itself, so a stream can be packed as it comes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import DropRecord, Encoder, Example
from unmask.data.records import Conversation, CustomFields, to_conversation
from unmask.data.tokenizer import check_tokenizer
from unmask.errors import UnmaskError

WINDOW = 2048  # examples packed together


class Row(list[Example]):
    """Examples that share a row, in their order in it."""


def pack(examples: Sequence[Example], length: int, window: int = WINDOW) -> list[Row]:
    """Put examples into rows as `pack_sizes` says.

    Examples:
        >>> examples = [Example([7] * size, [False] * size) for size in (3, 5, 2, 4)]
        >>> [[len(example.input_ids) for example in row] for row in pack(examples, 7)]
        [[3, 4], [5, 2]]
    """
    sizes = [len(example.input_ids) for example in examples]
    return [Row(examples[index] for index in row) for row in pack_sizes(sizes, length, window)]


class PackedRows(Sequence[Row]):
    """The rows of `pack` of examples of these sizes, which are read when a row is asked for."""

    def __init__(self, examples: Sequence[Example], sizes: Sequence[int], length: int) -> None:
        self.examples, self.indices = examples, pack_sizes(sizes, length)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Row(self.examples[number] for number in self.indices[index])


def pack_sizes(sizes: Sequence[int], length: int, window: int = WINDOW) -> list[list[int]]:
    """Best-fit decreasing: longest first, each into the fullest row it fits; the indices that share each row.

    Nothing is carried from one window of examples to the next. Rows come in the order of their first
    example, and a row's examples in the order they came in.

    Args:
        sizes: tokens of each example.
        length: most tokens of a row.
        window: examples looked at together; more of them fill the rows better.

    Raises:
        UnmaskError: an example is longer than a row.
    """
    if (longest := max(sizes, default=0)) > length:
        raise UnmaskError(f"an example of {longest} tokens does not fit a row of {length}.")
    packed: list[list[int]] = []
    for start in range(0, len(sizes), window):
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (free tokens, row), fullest row first
        taken = range(start, min(start + window, len(sizes)))
        for index in sorted(taken, key=lambda index: (-sizes[index], index)):
            place = bisect_left(room, (sizes[index], -1))
            if place < len(room):
                free, row = room.pop(place)
            else:
                free, row = length, len(rows)
                rows.append([])
            rows[row].append(index)
            insort(room, (free - sizes[index], row))
        packed += sorted(map(sorted, rows))
    return packed


def collate(
    examples: Sequence[Example | Row],
    pad_token_id: int,
    *,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad examples, or rows of packed ones, to one length L, a multiple of `pad_to_multiple_of`, and stack
    them.

    Returns:
        input_ids int64 (B, L); attention_mask int64 (B, L), 1 = token, 0 = padding; src_mask bool
        (B, L), True = source or padding: never masked; sample_ids int64 (B,) if examples carry any. Of rows
        segment_ids int64 (B, L), 0 = padding, 1 = first example of the row and so on, if a row has several;
        sample_ids are then (B, D), D the most examples of a row, with -1 where a row has fewer.

    Raises:
        UnmaskError: No example, an example whose two lists differ in length, or a bad setting.
    """
    if not examples:
        raise UnmaskError("a batch needs at least one example; got none.")
    if padding_side not in ("right", "left"):
        raise UnmaskError(f"padding_side must be right or left; got {padding_side!r}.")
    if pad_to_multiple_of < 1:
        raise UnmaskError(f"pad_to_multiple_of must be at least 1; got {pad_to_multiple_of}.")
    rows = [[one] if isinstance(one, Example) else one for one in examples]
    for number, example in enumerate(example for row in rows for example in row):
        if (ids := len(example.input_ids)) != (src := len(example.src_mask)):
            raise UnmaskError(
                f"example {number} of the batch: input_ids and src_mask must have one length; got {ids} and {src}."
            )
    sizes = [sum(len(example.input_ids) for example in row) for row in rows]
    shape = (len(rows), max(sizes) + -max(sizes) % pad_to_multiple_of)
    input_ids = torch.full(shape, pad_token_id)
    src_mask = torch.ones(shape, dtype=torch.bool)
    segment_ids = torch.zeros(shape, dtype=torch.int64)
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        stop = shape[1] - size if padding_side == "left" else 0
        for segment, example in enumerate(row, 1):
            start, stop = stop, stop + len(example.input_ids)
            input_ids[number, start:stop] = torch.tensor(
                example.input_ids, dtype=torch.int64
            )  # named: faster than found out
            src_mask[number, start:stop] = torch.tensor(example.src_mask, dtype=torch.bool)
            segment_ids[number, start:stop] = segment
    batch = {"input_ids": input_ids, "attention_mask": (segment_ids > 0).long(), "src_mask": src_mask}
    most = max(map(len, rows))
    if most > 1:
        batch["segment_ids"] = segment_ids
    ids_of = [[example.sample_id for example in row] + [-1] * (most - len(row)) for row in rows]
    if max(map(max, ids_of)) >= 0:
        table = torch.tensor(ids_of)
        batch["sample_ids"] = table if any(isinstance(one, Row) for one in examples) else table[:, 0]
    return batch


class SFTDataCollator:
    """Collates raw records, conversations or encoded examples for supervised fine-tuning.

    A batch may mix raw record dicts, `Conversation`, `Example` and dicts with `input_ids` and `src_mask`. A call
    returns what `collate` does, and instruction_lengths int64 (B,): source tokens before the first response.

    Args:
        format: of the records, see `data.sft.format` of a recipe; likewise `custom_format`.
        padding_side: see `collate`; likewise `pad_to_multiple_of`.
        encoding: arguments of `Encoder`: `layout`, `separator`, `train_on`, `end_fill`, `block_size`, ...

    Raises:
        UnmaskError: The tokenizer has no padding or end token, or a record cannot be used.

    Examples:
        >>> collator = SFTDataCollator(byte_tokenizer())
        >>> batch = collator([{"instruction": "Say hi.", "output": "hi"}])
        >>> batch["input_ids"].shape, batch["instruction_lengths"]
        (torch.Size([1, 30]), tensor([26]))
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str = "auto",
        custom_format: CustomFields | None = None,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int = 1,
        **encoding: Any,
    ) -> None:
        check_tokenizer(tokenizer, mask=False)
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer, **encoding)
        self.reading: dict[str, Any] = {"format": format, "custom_format": custom_format}
        self.padding: dict[str, Any] = {
            "padding_side": padding_side,
            "pad_to_multiple_of": pad_to_multiple_of,
        }

    def __call__(
        self, records: Sequence[Mapping[str, Any] | Conversation | Example]
    ) -> dict[str, torch.Tensor]:
        examples = [self._example(record, f"record {n} of the batch") for n, record in enumerate(records)]
        batch = collate(examples, cast(int, self.tokenizer.pad_token_id), **self.padding)
        lengths = [sum(1 for _ in takewhile(bool, example.src_mask)) for example in examples]
        return {**batch, "instruction_lengths": torch.tensor(lengths)}

    def _example(self, record: Any, where: str) -> Example:
        if isinstance(record, Example):
            return record
        if isinstance(record, Mapping) and "input_ids" in record:
            if "src_mask" not in record:
                raise UnmaskError(f"{where}: input_ids without src_mask (True = instruction, never masked).")
            ids, src = list(map(int, record["input_ids"])), list(map(bool, record["src_mask"]))
            return Example(ids, src, int(record.get("sample_id", -1)))
        if isinstance(record, Mapping):
            record = to_conversation(record, where=where, **self.reading)
        elif not isinstance(record, Conversation):
            raise UnmaskError(
                f"{where}: expected a record, a Conversation or an Example; got {type(record).__name__}."
            )
        try:
            return self.encoder.encode(record)
        except DropRecord as reason:
            raise UnmaskError(
                f"{record.where}: {reason}; raise block_size, or leave such records out with encode_records."
            ) from reason
