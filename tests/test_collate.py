from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.collate import Row, SFTDataCollator, collate
from unmask.data.encode import Example
from unmask.data.records import Conversation, CustomFields, Turn
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError

T, F = True, False
SHORT = Example([1, 2, 3], [T, T, F])
LONG = Example([4, 5, 6, 7, 8], [T, F, T, F, F])


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_and_packed_ones_have_segments(side: Literal["right", "left"]) -> None:
    padding: Any = {"pad_token_id": 9, "padding_side": side, "pad_to_multiple_of": 3}
    batch = collate([SHORT, LONG], **padding)
    own, rest = (slice(0, 3), slice(3, 6)) if side == "right" else (slice(3, 6), slice(0, 3))
    for name, values, fill in (
        ("input_ids", [1, 2, 3], 9),
        ("attention_mask", [1, 1, 1], 0),
        ("src_mask", SHORT.src_mask, T),
    ):
        assert batch[name].shape == (2, 6)
        assert batch[name][0, own].tolist() == values and batch[name][0, rest].tolist() == [fill] * 3
    types = {"input_ids": torch.int64, "attention_mask": torch.int64, "src_mask": torch.bool}
    assert {name: value.dtype for name, value in batch.items()} == types
    first, second = replace(SHORT, sample_id=4), replace(LONG, sample_id=5)
    batch = collate([Row([first, second]), Row([second])], **padding)
    packed = slice(0, 8) if side == "right" else slice(1, 9)
    assert batch["input_ids"][0, packed].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch["src_mask"][0, packed].tolist() == [T, T, F, T, F, T, F, F]
    assert batch["segment_ids"][0, packed].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert torch.equal(batch["segment_ids"] > 0, batch["attention_mask"].bool())
    assert batch["input_ids"][batch["attention_mask"] == 0].tolist() == [9] * 5
    assert batch["sample_ids"].tolist() == [[4, 5], [5, -1]]
    assert {batch[name].dtype for name in ("segment_ids", "sample_ids")} == {torch.int64}


def test_sample_ids_and_segments_only_where_there_are_any() -> None:
    plain = collate([SHORT, LONG], pad_token_id=0)
    assert "sample_ids" not in plain
    batch = collate([SHORT, replace(LONG, sample_id=7)], pad_token_id=0)
    assert batch["sample_ids"].tolist() == [-1, 7]
    # Rows of one example are not packed: the model need not keep documents apart.
    batch = collate([Row([replace(SHORT, sample_id=3)]), Row([replace(LONG, sample_id=8)])], pad_token_id=0)
    assert "segment_ids" not in batch and batch["sample_ids"].tolist() == [[3], [8]]
    assert all(torch.equal(batch[name], value) for name, value in plain.items())


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_example_can_be_read_back_from_its_segment(sizes: list[list[int]]) -> None:
    number = count(1)
    rows = [
        Row(Example([next(number) for _ in range(size)], [i % 2 == 0 for i in range(size)]) for size in row)
        for row in sizes
    ]
    batch = collate(rows, pad_token_id=0)
    segments = batch.get("segment_ids", batch["attention_mask"])
    for index, row in enumerate(rows):
        for segment, example in enumerate(row, 1):
            place = segments[index] == segment
            assert batch["input_ids"][index, place].tolist() == example.input_ids
            assert batch["src_mask"][index, place].tolist() == example.src_mask


@pytest.mark.parametrize(
    ("rows", "settings", "named"),
    [
        ([], {}, "at least one example"),
        ([Example([1, 2], [T])], {}, "src_mask"),
        ([SHORT], {"padding_side": "top"}, "padding_side"),
        ([SHORT], {"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_bad_batches(rows: list[Example], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnmaskError, match=named):
        collate(rows, pad_token_id=0, **settings)


def test_collator_takes_every_kind_of_record() -> None:
    collator = SFTDataCollator(byte_tokenizer())
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    conversation = Conversation(turns, "here")
    example = collator.encoder.encode(conversation)
    lists = {"input_ids": example.input_ids, "src_mask": example.src_mask}
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    records = [{"instruction": "q", "output": "a"}, {"messages": messages}, conversation, example, lists]
    batch = collator([*records, {name: torch.tensor(value) for name, value in lists.items()}])
    assert batch["input_ids"].tolist() == [example.input_ids] * 6
    assert batch["src_mask"].tolist() == [example.src_mask] * 6 and "sample_ids" not in batch


def test_collator_passes_its_settings_on() -> None:
    collator = SFTDataCollator(
        byte_tokenizer(),
        layout="separator",
        separator=" -> ",
        end_fill=4,
        format="custom",
        custom_format=CustomFields("question", None, "answer"),
        padding_side="left",
        pad_to_multiple_of=8,
    )
    batch = collator([{"question": "q", "answer": "a"}, {"question": "rs", "answer": "abcd"}])
    decoded = [collator.tokenizer.decode(row) for row in batch["input_ids"]]
    pad, end = "<|endoftext|>", "<|im_end|>"
    # The blank before a response is a part of it, as words of many tokenizers begin with theirs.
    assert decoded == [pad * 8 + "q -> a" + end * 2, pad * 3 + "rs -> abcd" + end * 3]


def test_instruction_lengths_are_the_leading_source_tokens() -> None:
    batch = SFTDataCollator(byte_tokenizer())([{"instruction": "Say hi.", "output": "hi"}])
    assert batch["input_ids"].shape == torch.Size([1, 30]) and batch["instruction_lengths"].tolist() == [26]
    rows = [Example([1, 2], [F, F]), Example([1, 2], [T, T]), LONG]
    assert SFTDataCollator(byte_tokenizer())(rows)["instruction_lengths"].tolist() == [0, 2, 1]


def test_padding_may_be_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    records = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "abc"}]
    batch = SFTDataCollator(tokenizer, layout="separator")(records)
    assert batch["input_ids"][0].tolist()[-3:] == [tokenizer.eos_token_id] * 3
    assert batch["src_mask"][0].tolist()[-3:] == [F, T, T]
    assert batch["attention_mask"][0].tolist()[-3:] == [1, 0, 0]


def test_tokenizers_that_lack_something() -> None:
    tokenizer = byte_tokenizer()
    for token in ("pad_token", "eos_token"):
        setattr(tokenizer, token, None)
        with pytest.raises(UnmaskError, match=token):
            SFTDataCollator(tokenizer)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"instruction": "q"}, "field 'output' is missing"),
        ({"words": "q"}, "no known format"),
        ({"instruction": "q", "output": ""}, "'output'"),
        ({"input_ids": [1]}, "src_mask"),
        ("text", "got str"),
        ({"instruction": "q" * 99, "output": "a"}, "block_size"),
    ],
)
def test_bad_records(record: Any, named: str) -> None:
    with pytest.raises(UnmaskError, match=f"record 1 of the batch: .*{named}"):
        SFTDataCollator(byte_tokenizer(), block_size=64)([{"instruction": "q", "output": "a"}, record])
