from __future__ import annotations

import random
from dataclasses import replace

import pytest

from unmask.data.collate import collate
from unmask.data.records import RecordError
from unmask.data.encode import EncodeReport, Example
from unmask.data.files import RecordFile, record_id
from unmask.data.collate import pack
from unmask.data.survey import Duplicates, Filling, SourceShare, place, record_rows, survey


def example(ids: list[int], sources: int = 0, source: int = 0, number: int = 0) -> Example:
    """An example whose first `sources` tokens are the prompt."""
    src_mask = [index < sources for index in range(len(ids))]
    return Example(ids, src_mask, source << 40 | number, source)


def test_tokens_per_source() -> None:
    examples = [example([1] * 6, 2, 0, 0), example([2] * 4, 1, 1, 7), example([3] * 2, 0, 1, 8)]
    found = survey(examples, names=["a.jsonl", "b.jsonl", "none.jsonl"])
    assert found.sources == (
        SourceShare("a.jsonl", 1, 6, 4),
        SourceShare("b.jsonl", 2, 6, 5),
        SourceShare("none.jsonl", 0, 0, 0),
    )
    assert (found.sequences, found.tokens, found.supervised, found.lengths) == (3, 12, 9, (2, 4, 6))
    assert sum(count for _, _, count in found.histogram) == 3


def test_duplicates_of_whole_sequences_and_of_prompts() -> None:
    examples = [
        example([1, 2, 3, 4], 2, 0, 0),
        example([1, 2, 3, 5], 2, 0, 1),  # the prompt alone
        example([1, 2, 3, 4], 2, 1, 0),  # all of it, in another source
        example([1, 2, 3, 4], 3, 1, 1),  # the same tokens, with a longer prompt
        example([1, 2, 3, 4], 0, 1, 2),  # without one
    ]
    whole, prompt = survey(examples, names=["a", "b"]).duplicates
    assert whole.repeats == 3
    assert whole.places[:2] == (("a record 1", "b record 1"), ("a record 1", "b record 2"))
    assert prompt.repeats == 2
    assert prompt.places == (("a record 1", "a record 2"), ("a record 1", "b record 1"))


def test_a_record_of_several_files_is_named_by_its_file() -> None:
    files = [["one.jsonl"], ["a.jsonl", "b.jsonl", "c.jsonl"]]
    row = example([1], source=1, number=record_id(2, 16, [RecordFile(name, name) for name in files[1]]))
    assert place(row, ["x", "parts"], files) == "parts c.jsonl record 17"
    assert place(replace(row, source=0), ["parts"], files[1:]) == "c.jsonl record 17"
    assert place(example([1], number=16), ["x", "parts"], files) == "x record 17"
    repeats = survey([row, row], names=["x", "parts"], files=files).duplicates[0]
    assert repeats.places == (("parts c.jsonl record 17",) * 2,)


def test_a_prompt_is_no_duplicate_of_its_beginning() -> None:
    whole, prompt = survey([example([1, 2, 3], 1), example([1, 2, 4], 2), example([259, 0], 1)]).duplicates
    assert (whole.repeats, prompt.repeats) == (0, 0)


def test_held_out_prompts_that_are_trained_on() -> None:
    examples = [example([1, 2, 3], 2), example([4, 5, 6], 2), example([4, 5, 6], 2)]
    held_out = [example([1, 2, 9], 2), example([1, 2, 3], 1), example([4, 5, 6], 2), example([7, 7], 0)]
    assert survey(examples, held_out=held_out).duplicates[2] == Duplicates(
        "held-out prompt that is trained on, too", 2, ()
    )
    blocks = [example([1, 2]), example([3, 4])]
    _, held = survey(blocks, held_out=[example([3, 4]), example([3, 5])]).duplicates
    assert held == Duplicates("held-out sequence that is trained on, too", 1, ())


def test_filled_positions_are_those_of_real_batches() -> None:
    draw = random.Random(0)
    sizes = [draw.randrange(5, 60) for _ in range(100)]
    examples = [example([7] * size, 1, 0, number) for number, size in enumerate(sizes)]
    found = survey(examples, block_size=64, micro_batch=100)
    block, longest, packed = (filling.share for filling in found.filling)
    assert block == pytest.approx(sum(sizes) / (100 * 64))
    batch = collate(examples, pad_token_id=0)["attention_mask"]
    assert longest == pytest.approx(batch.float().mean().item())
    rows = list(pack(examples, 64))
    assert packed == pytest.approx(sum(sizes) / (len(rows) * 64)) and packed > 0.9
    assert longest < survey(examples, micro_batch=4).filling[0].share < 1  # of few, fewer are much shorter


def test_the_rows_of_the_run_are_named() -> None:
    examples = [example([7] * 10) for _ in range(6)]
    for packed, words in ((False, "packed into rows of 64"), (True, "packed into rows of 64, as here")):
        filling = survey(examples, block_size=64, packed=packed).filling
        assert filling[1:] == (Filling(words, 60 / 64),)


def test_the_last_batch_may_be_small() -> None:
    examples = [example([7] * 10), example([7] * 10), example([7] * 5)]
    [filling] = survey(examples, micro_batch=2).filling
    assert filling.share in (pytest.approx(25 / 25), pytest.approx(25 / 30))


def test_places() -> None:
    assert place(example([1], 0, 1, 1233), ["a", "b"]) == "b record 1,234"
    assert place(example([1], 0, 0, 4), ["a"]) == "record 5"
    assert place(Example([1], [False]), ["a", "b"]) == "a"
    assert place(Example([1], [False])) == ""


def test_every_reason_has_a_row_with_its_first_place() -> None:
    report = EncodeReport(records=5, kept=1, formats={"alpaca": 4})
    for line in (3, 4):
        report.skip(RecordError(f"x line {line}", "not valid JSON", f" (column {line})"))
    report.skip(RecordError("x line 7", "field 'output' is empty"))
    report.drop("longer than block_size", "x line 5")
    assert list(record_rows(report)) == [
        ("read", "5", "format: alpaca (4)"),
        ("kept", "1", ""),
        ("dropped", "1", "longer than block_size; first: x line 5"),
        ("skipped", "2", "not valid JSON; first: x line 3"),
        ("skipped", "1", "field 'output' is empty; first: x line 7"),
    ]
    assert report.left_out() == [
        "1 dropped: longer than block_size (first: x line 5)",
        "2 skipped: not valid JSON (first: x line 3)",
        "1 skipped: field 'output' is empty (first: x line 7)",
    ]
