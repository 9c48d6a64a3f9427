"""Examples -> a batch of tensors; the only place that pads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import Conversation, CustomFields, to_conversation
from unmask.data.encode import SEPARATOR, DropRecord, Encoder, Example
from unmask.data.pack import Row
from unmask.data.tokenizer import check_tokenizer
from unmask.errors import UnmaskError


def collate(
    examples: Sequence[Example | Row],
    *,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> dict[str, torch.Tensor]:
    """Pad examples, or rows of packed ones, to one length L, a multiple of `pad_to_multiple_of`, and stack
    them.

    Returns:
        input_ids int64 (B, L); attention_mask int64 (B, L), 1 = token, 0 = padding; src_mask bool
        (B, L), True = source or padding: never masked; instruction_lengths int64 (B,), leading
        source tokens of each row, padding not counted; sample_ids int64 (B,) if examples carry any,
        and epochs (B,) if they carry one. Of rows segment_ids int64 (B, L), 0 = padding, 1 = first
        example of the row and so on, if a row has several; sample_ids and epochs are then (B, D), D the
        most examples of a row, with -1 where a row has fewer.

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
        ids, src = len(example.input_ids), len(example.src_mask)
        if ids != src:
            raise UnmaskError(
                f"example {number} of the batch: input_ids and src_mask must have one length; "
                f"got {ids} and {src}."
            )
    sizes = [sum(len(example.input_ids) for example in row) for row in rows]
    shape = (len(rows), max(sizes) + -max(sizes) % pad_to_multiple_of)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    src_mask = torch.ones(shape, dtype=torch.bool)
    segment_ids = torch.zeros(shape, dtype=torch.int64)
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        stop = shape[1] - size if padding_side == "left" else 0
        for segment, example in enumerate(row, 1):
            start, stop = stop, stop + len(example.input_ids)
            place = (number, slice(start, stop))
            input_ids[place] = torch.tensor(example.input_ids, dtype=torch.int64)
            attention_mask[place] = 1
            src_mask[place] = torch.tensor(example.src_mask, dtype=torch.bool)
            segment_ids[place] = segment
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "src_mask": src_mask,
        "instruction_lengths": torch.tensor([_leading(row) for row in rows]),
    }
    most = max(map(len, rows))
    if most > 1:
        batch["segment_ids"] = segment_ids
    packed = not all(isinstance(one, Example) for one in examples)
    for name, attribute in (("sample_ids", "sample_id"), ("epochs", "epoch")):
        values = [[getattr(example, attribute) for example in row] for row in rows]
        if max(map(max, values)) >= 0:
            table = torch.tensor([row + [-1] * (most - len(row)) for row in values])
            batch[name] = table if packed else table[:, 0]
    return batch


class SFTDataCollator:
    """Collates raw records, conversations or encoded examples for supervised fine-tuning.

    The keyword arguments of the encoding are those of `Encoder`. A batch may mix raw record dicts,
    `Conversation`, `Example` and dicts with `input_ids` and `src_mask`.

    Returns from a call:
        input_ids int64 (B, L); attention_mask int64 (B, L), 1 = token; src_mask bool (B, L), True =
        source or padding: never masked; instruction_lengths int64 (B,); sample_ids int64 (B,) if
        examples carry any.

    Raises:
        UnmaskError: The tokenizer has no padding or end token, or a record cannot be used.

    Example:
        >>> collator = SFTDataCollator(byte_tokenizer())
        >>> batch = collator([{"instruction": "Say hi.", "output": "hi"}])
        >>> batch["input_ids"].shape, batch["instruction_lengths"]
        (torch.Size([1, 30]), tensor([26]))
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
        format: str = "auto",
        custom_format: CustomFields | None = None,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int = 1,
    ) -> None:
        check_tokenizer(tokenizer, mask=False)
        self.tokenizer = tokenizer
        self.encoder = Encoder(
            tokenizer,
            layout=layout,
            separator=separator,
            train_on=train_on,
            include_system_prompt=include_system_prompt,
            end_fill=end_fill,
            block_size=block_size,
            too_long=too_long,
        )
        self.format = format
        self.custom_format = custom_format
        self.padding_side: Literal["right", "left"] = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(
        self, records: Sequence[Mapping[str, Any] | Conversation | Example]
    ) -> dict[str, torch.Tensor]:
        examples = [self._example(record, number) for number, record in enumerate(records)]
        return collate(
            examples,
            pad_token_id=self.tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
            padding_side=self.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def _example(self, record: Mapping[str, Any] | Conversation | Example, number: int) -> Example:
        where = f"record {number} of the batch"
        if isinstance(record, Example):
            return record
        if isinstance(record, Mapping) and "input_ids" in record:
            if "src_mask" not in record:
                raise UnmaskError(
                    f"{where}: input_ids come without src_mask (True = instruction, never masked)."
                )
            ids, src = list(map(int, record["input_ids"])), list(map(bool, record["src_mask"]))
            return Example(ids, src, int(record.get("sample_id", -1)))
        if isinstance(record, Mapping):
            record = to_conversation(record, self.format, where=where, custom_format=self.custom_format)
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


def _leading(row: Row) -> int:
    """Source tokens before the first supervised one."""
    return sum(1 for _ in takewhile(bool, chain.from_iterable(example.src_mask for example in row)))
