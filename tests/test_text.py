from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.data.encode import EncodeReport, pack_text, split_documents, usable_documents
from unmask.data.records import RecordError
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError


def numbered(documents: list[str]) -> list[tuple[str, int, int]]:
    return [(document, 0, number) for number, document in enumerate(documents)]


def test_usable_documents() -> None:
    documents: list[tuple[Any, str, int, int]] = [
        ("fine", "x line 1", 5, 0),
        (RecordError("x line 2", "field 'text' is missing", "; fields here: a"), "x line 2", 5, 1),
        ("<|im_end|>", "x line 3", 5, 2),
        ("\ud800", "x line 4", 5, 3),
    ]
    report = EncodeReport()
    texts = list(usable_documents(documents, byte_tokenizer(), report, "skip"))
    assert texts == [("fine", 5, 0), ("<|im_end|>", 5, 2)]
    assert report.skipped == {
        "field 'text' is missing": (1, "x line 2"),
        "field 'text' has an unpaired surrogate": (1, "x line 4"),
    }
    assert (report.records, report.kept, report.notes) == (
        4,
        2,
        {"held strings like special tokens, read as plain text": 1},
    )
    with pytest.raises(RecordError, match=r"^x line 2: field 'text' is missing; fields here: a\.$"):
        list(usable_documents(documents, byte_tokenizer(), EncodeReport()))


def test_pack_text() -> None:
    tokenizer = byte_tokenizer()
    blocks = list(pack_text(["abcd", "e<|im_end|>", "fg"], tokenizer, 6))
    assert [len(block.input_ids) for block in blocks] == [6, 6, 6, 1]
    assert [block.record for block in blocks] == [0, 1, 2, 3]
    assert not any(any(block.src_mask) for block in blocks)
    ids = [i for block in blocks for i in block.input_ids]
    assert [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id] == [4, 16]
    assert tokenizer.decode(ids) == "abcd<|im_end|>e<|im_end|><|im_end|>fg"


def test_pack_text_errors() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UnmaskError, match="block_size must be at least 2 tokens; got 1"):
        list(pack_text(["a"], tokenizer, 1))
    with pytest.raises(UnmaskError, match="no text to pack"):
        list(pack_text([], tokenizer, 4))
    tokenizer.eos_token = None
    with pytest.raises(UnmaskError, match="no end token"):
        list(pack_text(["a"], tokenizer, 4))


def test_packed_documents_are_examples_of_their_own_with_their_end_token() -> None:
    tokenizer = byte_tokenizer()
    report = EncodeReport()
    documents = ["abcd", "", "e<|im_end|>", "0123456789", "vwxyz"]
    parts = list(split_documents(numbered(documents), tokenizer, 6, report=report))
    texts = [tokenizer.decode(part.input_ids) for part in parts]
    end = "<|im_end|>"
    # The string in a document is plain text; a document as long as a row leaves its end token to the next.
    assert texts == [f"abcd{end}", "e<|im_", f"end|>{end}", "012345", f"6789{end}", f"vwxyz{end}"]
    end_id = int(tokenizer.convert_tokens_to_ids(end))  # pyright: ignore[reportArgumentType]
    assert [part.input_ids.count(end_id) for part in parts] == [1, 0, 1, 0, 1, 1]
    assert [part.record for part in parts] == [0, 2, 2, 3, 3, 4]
    assert len({part.sample_id for part in parts}) == 6
    assert not any(any(part.src_mask) for part in parts)
    assert (report.truncated, report.tokens, report.supervised_tokens) == (0, 34, 34)


def test_long_documents_may_be_cut_and_are_counted() -> None:
    tokenizer = byte_tokenizer()
    report = EncodeReport()
    parts = list(
        split_documents(
            [("0123456789", 3, 0), ("abc", 3, 1), ("uvwxyz", 3, 2)],
            tokenizer,
            6,
            "cut",
            report=report,
        )
    )
    assert [tokenizer.decode(part.input_ids) for part in parts] == ["012345", "abc<|im_end|>", "uvwxyz"]
    assert report.truncated == 2
    assert [(part.file, part.record) for part in parts] == [(3, 0), (3, 1), (3, 2)]


@given(st.lists(st.text("ab", max_size=40), min_size=1, max_size=8).filter(any), st.integers(2, 20))
def test_split_documents_can_be_joined_again(documents: list[str], block_size: int) -> None:
    tokenizer = byte_tokenizer()
    parts = list(split_documents(numbered(documents), tokenizer, block_size))
    ids = [i for part in parts for i in part.input_ids]
    assert tokenizer.decode(ids) == "".join(f"{text}<|im_end|>" for text in documents if text)
    assert all(0 < len(part.input_ids) <= block_size for part in parts)


def test_split_documents_errors() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UnmaskError, match="block_size must be at least 2 tokens; got 1"):
        list(split_documents([("a", 0, 0)], tokenizer, 1))
    with pytest.raises(UnmaskError, match="long_documents must be one of split, cut; got 'drop'"):
        list(split_documents([("a", 0, 0)], tokenizer, 4, "drop"))  # pyright: ignore[reportArgumentType]
    assert not list(split_documents([("", 0, 0), ("", 0, 1)], tokenizer, 4))
    tokenizer.eos_token = None
    with pytest.raises(UnmaskError, match="no end token"):
        list(split_documents([("a", 0, 0)], tokenizer, 4))
