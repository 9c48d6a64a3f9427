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


@pytest.mark.parametrize(
    ("side", "ids", "attention", "src"),
    [
        ("right", [1, 2, 3, 9, 9, 9], [1, 1, 1, 0, 0, 0], [T, T, F, T, T, T]),
        ("left", [9, 9, 9, 1, 2, 3], [0, 0, 0, 1, 1, 1], [T, T, T, T, T, F]),
    ],
)
def test_padding(
    side: Literal["right", "left"], ids: list[int], attention: list[int], src: list[bool]
) -> None:
    batch = collate([SHORT, LONG], pad_token_id=9, padding_side=side, pad_to_multiple_of=3)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["attention_mask"][0].tolist() == attention
    assert batch["src_mask"][0].tolist() == src
    types = {"input_ids": torch.int64, "attention_mask": torch.int64, "src_mask": torch.bool}
    assert {name: value.dtype for name, value in batch.items()} == types


def test_sample_ids_only_where_there_are_any() -> None:
    assert "sample_ids" not in collate([SHORT, LONG], pad_token_id=0)
    batch = collate([SHORT, Example([1], [F], sample_id=7)], pad_token_id=0)
    assert batch["sample_ids"].tolist() == [-1, 7]


# Rows of packed examples.


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows(side: Literal["right", "left"]) -> None:
    first, second = replace(SHORT, sample_id=4), replace(LONG, sample_id=5)
    batch = collate(
        [Row([first, second]), Row([second])], pad_token_id=9, padding_side=side, pad_to_multiple_of=5
    )
    packed = slice(0, 8) if side == "right" else slice(2, 10)
    assert batch["input_ids"][0, packed].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch["src_mask"][0, packed].tolist() == [T, T, F, T, F, T, F, F]
    assert batch["segment_ids"][0, packed].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert batch["segment_ids"].sum(dim=1).tolist() == [13, 5]  # 0 = padding
    assert torch.equal(batch["segment_ids"] > 0, batch["attention_mask"].bool())
    assert batch["input_ids"][batch["attention_mask"] == 0].tolist() == [9] * 7
    assert batch["sample_ids"].tolist() == [[4, 5], [5, -1]]
    assert {batch[name].dtype for name in ("segment_ids", "sample_ids")} == {torch.int64}


def test_rows_of_one_example_are_not_packed() -> None:
    """The model then need not keep documents apart."""
    batch = collate([Row([replace(SHORT, sample_id=3)]), Row([replace(LONG, sample_id=8)])], pad_token_id=0)
    assert "segment_ids" not in batch
    assert batch["sample_ids"].tolist() == [[3], [8]]
    plain = collate([SHORT, LONG], pad_token_id=0)
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
    ("rows", "settings", "error"),
    [
        ([], {}, "at least one example"),
        ([Example([1, 2], [T])], {}, "example 0 of the batch: .* one length; got 2 and 1"),
        ([SHORT], {"padding_side": "top"}, "padding_side must be right or left; got 'top'"),
        ([SHORT], {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1; got 0"),
    ],
)
def test_bad_batches(rows: list[Example], settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UnmaskError, match=error):
        collate(rows, pad_token_id=0, **settings)


def test_collator_takes_every_kind_of_record() -> None:
    collator = SFTDataCollator(byte_tokenizer())
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    conversation = Conversation(turns, "here")
    example = collator.encoder.encode(conversation)
    batch = collator(
        [
            {"instruction": "q", "output": "a"},
            {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]},
            conversation,
            example,
            {"input_ids": example.input_ids, "src_mask": example.src_mask},
            {
                "input_ids": torch.tensor(example.input_ids),
                "src_mask": torch.tensor(example.src_mask),
            },
        ]
    )
    for name in ("input_ids", "src_mask", "attention_mask"):
        assert (batch[name] == batch[name][0]).all()
    assert batch["input_ids"][0].tolist() == example.input_ids
    assert batch["src_mask"][0].tolist() == example.src_mask
    assert "sample_ids" not in batch


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


def test_docstring_example() -> None:
    batch = SFTDataCollator(byte_tokenizer())([{"instruction": "Say hi.", "output": "hi"}])
    assert batch["input_ids"].shape == torch.Size([1, 30])
    assert batch["instruction_lengths"].tolist() == [26]
    rows = [Example([1, 2], [F, F]), Example([1, 2], [T, T]), LONG]  # leading source tokens alone count
    assert SFTDataCollator(byte_tokenizer())(rows)["instruction_lengths"].tolist() == [0, 2, 1]


def test_padding_may_be_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = SFTDataCollator(tokenizer, layout="separator")(
        [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "abc"}]
    )
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist()[-3:] == [end] * 3
    assert batch["src_mask"][0].tolist()[-3:] == [F, T, T]
    assert batch["attention_mask"][0].tolist()[-3:] == [1, 0, 0]


def test_tokenizers_that_lack_something() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UnmaskError, match=r"pad_token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        SFTDataCollator(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UnmaskError, match="no end token"):
        SFTDataCollator(tokenizer)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"instruction": "q"}, "record 1 of the batch: no known format"),
        ({"instruction": "q", "output": ""}, "record 1 of the batch: field 'output' is empty"),
        ({"input_ids": [1]}, "record 1 of the batch: input_ids come without src_mask"),
        ("text", "record 1 of the batch: expected a record, a Conversation or an Example; got str"),
        ({"instruction": "q" * 99, "output": "a"}, "record 1 of the batch: response would vanish"),
    ],
)
def test_bad_records(record: Any, error: str) -> None:
    collator = SFTDataCollator(byte_tokenizer(), block_size=64)
    with pytest.raises(UnmaskError, match=error):
        collator([{"instruction": "q", "output": "a"}, record])
