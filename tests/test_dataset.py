from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import autoregressive_folder
from transformers import PreTrainedTokenizerBase

from unmask.config import Recipe, recipe_from_dict
from unmask.data.dataset import custom_fields, load_data, make_encoder, run_tokenizer
from unmask.data.encode import Encoder, Example, encode_records, pack_text
from unmask.data.files import read_records
from unmask.data.records import CustomFields
from unmask.errors import UnmaskError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, first in (("a.jsonl", 0), ("b.jsonl", 10)):
        records = [{"prompt": f"Say {n}", "completion": f"{n}!"} for n in range(first, first + 10)]
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("one.txt").write_text("abcdefghij" * 5)
    Path("two.txt").write_text("0123456789" * 3)
    return tmp_path


def recipe(**data: Any) -> Recipe:
    """An SFT recipe, or one of pre-training where the data is text."""
    name = data.setdefault("dataset_name", "a.jsonl")
    text = str(name).endswith(("txt", "txt']"))
    return recipe_from_dict(
        {
            "training_mode": "pretrain" if text else "sft",
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {"block_size": 64, **data},
        }
    )


def texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each example teaches."""
    return [
        str(tokenizer.decode([i for i, source in zip(e.input_ids, e.src_mask, strict=True) if not source]))
        for e in examples
    ]


def test_sft_data_is_what_the_encoder_makes_of_the_records(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(), tokenizer)
    assert list(loaded.train) == encode_records(read_records("a.jsonl"), Encoder(tokenizer, block_size=64))[0]
    assert loaded.held_out == []
    assert loaded.report is not None and loaded.report.formats == {"prompt_completion": 10}
    assert texts(loaded.train, tokenizer) == [f"{n}!<|im_end|>" for n in range(10)]


def test_several_sources_follow_one_another_with_ids_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(dataset_name=["a.jsonl", "b.jsonl"]), tokenizer)
    assert texts(loaded.train, tokenizer) == [f"{n}!<|im_end|>" for n in range(20)]
    assert [example.record for example in loaded.train] == [*range(10), *range(10)]
    assert len({example.sample_id for example in loaded.train}) == 20


def test_the_end_is_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(dataset_name=["a.jsonl", "b.jsonl"], max_records=14, eval_size=3), tokenizer)
    ids = [*range(10), *range(4)]
    assert [example.record for example in loaded.train] == ids[:11]
    assert [example.record for example in loaded.held_out] == ids[11:]


def test_evaluation_data_of_its_own_is_read_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(eval_dataset_name="b.jsonl", max_records=4), tokenizer)
    assert texts(loaded.train, tokenizer) == [f"{n}!<|im_end|>" for n in range(4)]
    assert texts(loaded.held_out, tokenizer) == [f"{n}!<|im_end|>" for n in range(10, 20)]
    assert loaded.report is not None and loaded.report.records == 4  # the training data's


def test_pretraining_data_is_packed_text(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(dataset_name=["one.txt", "two.txt"], block_size=16, eval_size=2), tokenizer)
    whole = list(pack_text(["abcdefghij" * 5, "0123456789" * 3], tokenizer, 16))
    assert [one.input_ids for one in (*loaded.train, *loaded.held_out)] == [one.input_ids for one in whole]
    assert len(loaded.held_out) == 2 and loaded.encoder is None
    assert loaded.report is not None and loaded.report.formats == {"text": 2}
    ids = [i for example in whole for i in example.input_ids]
    assert tokenizer.decode(ids) == "abcdefghij" * 5 + "<|im_end|>" + "0123456789" * 3


def test_pretraining_with_text_columns_and_evaluation_data(
    place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (place / "c.json").write_text(json.dumps([{"body": "aaa"}, {"body": "bbb"}, {"body": "ccc"}]))
    plan = recipe_from_dict(
        {
            "training_mode": "pretrain",
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {
                "dataset_name": "c.json",
                "text_field": "body",
                "max_records": 2,
                "eval_dataset_name": "one.txt",
            },
        }
    )
    loaded = load_data(plan, tokenizer)
    assert texts(loaded.train, tokenizer) == ["aaa<|im_end|>bbb"]
    assert texts(loaded.held_out, tokenizer) == ["abcdefghij" * 5]


@pytest.mark.parametrize("size", [10, 11])
def test_not_all_can_be_held_out(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    with pytest.raises(UnmaskError, match=f"data.eval_size: {size} are to be held out, .* only 10 examples"):
        load_data(recipe(eval_size=size), tokenizer)


def test_if_nothing_can_be_used_the_reason_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnmaskError) as caught:
        load_data(recipe(block_size=8, eval_size=2), tokenizer)
    assert str(caught.value) == (
        "a.jsonl: no record can be used: 10 dropped: response would vanish: the prompt alone fills block_size"
        " (first: a.jsonl line 1)."
    )


def test_the_recipe_reaches_the_encoder(tokenizer: PreTrainedTokenizerBase) -> None:
    sft = {
        "layout": "separator",
        "instruction_response_separator": " => ",
        "train_on": "last",
        "include_system_prompt": False,
        "end_fill": 4,
        "too_long": "drop",
    }
    encoder = make_encoder(recipe(sft=sft, block_size=40), tokenizer)
    expected = Encoder(
        tokenizer,
        layout="separator",
        separator=" => ",
        train_on="last",
        include_system_prompt=False,
        end_fill=4,
        too_long="drop",
        block_size=40,
    )
    for name in ("chat_template", "train_on", "include_system_prompt", "end_fill", "too_long", "block_size"):
        assert getattr(encoder, name) == getattr(expected, name)


def test_custom_fields_reach_the_records(tokenizer: PreTrainedTokenizerBase) -> None:
    names = {"instruction_field": "q", "response_field": "a", "system_field": "s", "input_field": "i"}
    plan = recipe(sft={"format": "custom", "custom_format": names})
    assert custom_fields(plan) == CustomFields("q", "i", "a", "s")
    assert custom_fields(recipe()) is None
    Path("a.jsonl").write_text(json.dumps({"q": "Why", "a": "Because", "s": "Be kind", "i": "?"}))
    [example] = load_data(plan, tokenizer).train
    assert texts([example], tokenizer) == ["Because<|im_end|>"]
    assert "Be kind" in str(tokenizer.decode(example.input_ids))


def test_the_runs_tokenizer_has_a_mask_token(place: Path) -> None:
    autoregressive_folder(place / "base")
    plan = recipe_from_dict({"model": {"name_or_path": "base"}, "data": {"dataset_name": "one.txt"}})
    assert run_tokenizer(plan).mask_token_id == 259
    bytes_ = recipe_from_dict(
        {"model": {"name_or_path": "base", "tokenizer": "bytes"}, "data": {"dataset_name": "one.txt"}}
    )
    assert run_tokenizer(bytes_).mask_token_id == 259 and len(run_tokenizer(bytes_)) == 260
