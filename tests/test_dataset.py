"""From a recipe's data section to examples: read, encoded, held out, prepared ahead of time, streamed."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import autoregressive_folder
from transformers import PreTrainedTokenizerBase

from unmask.config import Recipe, recipe_from_dict
from unmask.data.dataset import examples_of, load_data, make_encoder, prepare, run_tokenizer
from unmask.data.encode import Encoder, Example, encode_records
from unmask.data.files import read_records
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


def recipe(mode: str = "sft", **data: Any) -> Recipe:
    """A recipe of steps of four records; its data are a.jsonl unless given."""
    if "sources" not in data:
        data.setdefault("dataset_name", "a.jsonl")
    return recipe_from_dict(
        {
            "training_mode": mode,
            "seed": 3,
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {"block_size": 64, **data},
            "global_batch_size": 4,
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
    assert len(loaded.held_out) == 0 and loaded.report.formats == {"prompt_completion": 10}
    loaded = load_data(recipe(dataset_name=["a.jsonl", "b.jsonl"]), tokenizer)  # one after the other
    assert texts(loaded.train, tokenizer) == [f"{n}!<|im_end|>" for n in range(20)]
    assert [example.record for example in loaded.train] == [*range(10), *range(10)]
    assert len({example.sample_id for example in loaded.train}) == 20


def test_the_end_is_held_out_unless_evaluation_data_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(recipe(dataset_name=["a.jsonl", "b.jsonl"], max_records=14, eval_size=3), tokenizer)
    ids = [*range(10), *range(4)]
    assert [example.record for example in loaded.train] == ids[:11]
    assert [example.record for example in loaded.held_out] == ids[11:]
    loaded = load_data(recipe(eval_dataset_name="b.jsonl", max_records=4), tokenizer)
    assert texts(loaded.train, tokenizer) == [f"{n}!<|im_end|>" for n in range(4)]
    assert texts(loaded.held_out, tokenizer) == [f"{n}!<|im_end|>" for n in range(10, 20)]
    assert loaded.report.records == 4  # the training data's
    for size in (10, 11):
        with pytest.raises(UnmaskError, match=r"data.eval_size: .* only 10 examples"):
            load_data(recipe(eval_size=size), tokenizer)


def test_pretraining_data_is_packed_text(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_data(
        recipe("pretrain", dataset_name=["one.txt", "two.txt"], block_size=16, eval_size=2), tokenizer
    )
    assert len(loaded.held_out) == 2 and loaded.encoder is None and loaded.report.formats == {"text": 2}
    assert [len(one.input_ids) for one in (*loaded.train, *loaded.held_out)] == [16] * 5 + [1]
    ids = [i for example in (*loaded.train, *loaded.held_out) for i in example.input_ids]
    assert tokenizer.decode(ids) == "abcdefghij" * 5 + "<|im_end|>" + "0123456789" * 3
    Path("c.json").write_text(json.dumps([{"body": "aaa"}, {"body": "bbb"}, {"body": "ccc"}]))
    data = {"text_field": "body", "max_records": 2, "eval_dataset_name": "one.txt"}
    loaded = load_data(recipe("pretrain", dataset_name="c.json", **data), tokenizer)
    assert texts(loaded.train, tokenizer) == ["aaa<|im_end|>bbb"]
    assert texts(loaded.held_out, tokenizer) == ["abcdefghij" * 5]


def test_if_nothing_can_be_used_the_reason_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    for streaming in (False, True):
        dropped = r"10 dropped: .*a.jsonl line 1, \d+ tokens\)"
        said = rf"^a.jsonl: no record can be used: {dropped}; raise data.block_size, now 8.$"
        with pytest.raises(UnmaskError, match=said):
            load_data(recipe(block_size=8, streaming=streaming), tokenizer)


def test_the_recipe_reaches_encoder_and_records(tokenizer: PreTrainedTokenizerBase) -> None:
    same = {"layout": "separator", "train_on": "last", "include_system_prompt": False, "end_fill": 4}
    sft = {**same, "instruction_response_separator": " => ", "too_long": "drop"}
    encoder = make_encoder(recipe(sft=sft, block_size=40), tokenizer)
    expected = Encoder(tokenizer, **same, separator=" => ", too_long="drop", block_size=40)  # pyright: ignore
    for name in ("chat_template", "train_on", "include_system_prompt", "end_fill", "too_long", "block_size"):
        assert getattr(encoder, name) == getattr(expected, name)
    names = {"instruction_field": "q", "response_field": "a", "system_field": "s", "input_field": "i"}
    Path("a.jsonl").write_text(json.dumps({"q": "Why", "a": "Because", "s": "Be kind", "i": "?"}))
    custom = {"format": "custom", "custom_format": names}
    for data in (
        recipe(sft=custom),
        recipe(sources=[{"dataset_name": "a.jsonl", **custom}]),
        recipe(sources=[{"dataset_name": "a.jsonl"}], sft=custom),
    ):
        [example] = load_data(data, tokenizer).train
        assert texts([example], tokenizer) == ["Because<|im_end|>"]
        assert "Be kind" in str(tokenizer.decode(example.input_ids))


def test_a_step_has_no_record_twice_where_there_are_few(tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_data(recipe(max_records=3), tokenizer)  # of four a step
    for step in range(3):
        units = data.steps().at(step) or []
        assert [(unit.epoch, unit.place) for unit in units] == [(step, 0), (step, 1), (step, 2)]
        assert len({unit.row.sample_id for unit in units if isinstance(unit.row, Example)}) == 3
    with pytest.raises(UnmaskError, match=r"global_batch_size: 3 sequences, .* 2 processes; .* set it to 2"):
        data.steps(0, 2)


def test_fill_beyond_the_block_is_no_truncation(tokenizer: PreTrainedTokenizerBase) -> None:
    Path("a.jsonl").write_text(json.dumps({"prompt": "q", "completion": "abc"}))
    whole = load_data(recipe(sft={"layout": "separator"}), tokenizer)
    size = len(whole.train[0].input_ids)  # with one end token
    for block_size, truncated in ((size + 2, 0), (size, 0), (size - 1, 1)):
        data = load_data(
            recipe(sft={"layout": "separator", "end_fill": 32}, block_size=block_size), tokenizer
        )
        assert len(data.train[0].input_ids) == block_size and data.report.truncated == truncated
        assert (tokenizer.eos_token_id in data.train[0].input_ids) == (not truncated)


def test_the_runs_tokenizer_has_a_mask_token(place: Path) -> None:
    autoregressive_folder(place / "base")
    for model, size in ({"name_or_path": "base"}, 260), ({"name_or_path": "base", "tokenizer": "bytes"}, 260):
        found = run_tokenizer(recipe_from_dict({"model": model, "data": {"dataset_name": "one.txt"}}))
        assert found.mask_token_id == 259 and len(found) == size


# Prepared data


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("mode", ["sft", "pretrain", "packed"])
def test_the_folder_is_the_same_for_any_number_of_processes(
    mode: str, place: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if mode == "sft":
        plan = recipe(dataset_name=["a.jsonl", "b.jsonl"])
    else:
        lines = [json.dumps({"text": "x" * (n % 7) + str(n) * 5}) for n in range(20)]
        Path("t.jsonl").write_text("\n".join(lines))
        plan = recipe("pretrain", dataset_name="t.jsonl", block_size=16, packing=mode == "packed")
    first, manifest = (prepare(plan, f"out{n}", workers=n, shard_records=6) for n in (1, 3))
    assert contents(place / "out1") == contents(place / "out3") and len(manifest.shards) == 4
    assert manifest.report.kept == 20
    stamps = {file.name: file.stat().st_mtime_ns for file in (place / "out1").iterdir()}
    assert prepare(plan, "out1", shard_records=6) == first  # nothing is encoded again
    assert {file.name: file.stat().st_mtime_ns for file in (place / "out1").iterdir()} == stamps
    if mode != "pretrain":  # where documents are joined within a shard
        ready = load_data(
            recipe(plan.training_mode, **{**plan.data.model_dump(), "dataset_name": "out3"}), tokenizer
        )
        direct = load_data(plan, tokenizer)
        assert list(ready.train) == list(direct.train)
        assert [direct.steps().at(step) for step in range(9)] == [ready.steps().at(step) for step in range(9)]
        assert ready.totals() == (manifest.counts["tokens"], manifest.counts["supervised_tokens"])


@pytest.mark.slow
def test_killed_at_any_moment_the_same_call_resumes_to_the_same_bytes(place: Path) -> None:
    records = [{"prompt": f"Say {n}", "completion": f"{n}! " * 20} for n in range(4000)]
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = recipe(block_size=512)
    prepare(plan, "whole", shard_records=200, workers=1)
    draw, kills = random.Random(0), 0
    for attempt in count(1):
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            prepare(plan, "killed", shard_records=200, workers=1 + attempt % 2)
            os._exit(0)
        time.sleep(draw.uniform(0, attempt / 10))
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills > 1 and contents(place / "killed") == contents(place / "whole")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_is_finished(place: Path) -> None:
    records = [{"prompt": f"Say {n}", "completion": "x" * (40 if n > 39 else 1)} for n in range(80)]
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plan = recipe()
    prepare(plan, "whole", shard_records=40, workers=1)
    sizes = [shard["bytes"] for shard in json.loads(Path("whole/manifest.json").read_text())["shards"]]
    error = r"^out: cannot be written: .* same command resumes"
    with full_disk(sizes[0]), pytest.raises(UnmaskError, match=error):
        prepare(plan, "out", shard_records=40, workers=1)
    assert {"shard-00000.arrow", "shard-00000.json"} < set(contents(place / "out"))
    with pytest.raises(UnmaskError, match=r"was interrupted; run the same `unmask prepare` again"):
        load_data(recipe(dataset_name="out"), run_tokenizer(plan))
    prepare(plan, "out", shard_records=40)
    assert contents(place / "out") == contents(place / "whole")


def test_what_does_not_fit_prepared_data_is_refused_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    prepare(recipe(max_records=8), "out", shard_records=5)
    assert len(load_data(recipe(dataset_name="out"), tokenizer).train) == 8

    def refused(words: str, **data: Any) -> None:
        with pytest.raises(UnmaskError, match=words):
            load_data(recipe(**{"dataset_name": "out", **data}), tokenizer)

    refused(r"data.block_size: prepared 64, now 32", block_size=32)
    refused(r"data.max_records: prepared 8, now 5", max_records=5)
    refused(r"data.sft.end_fill: prepared 1, now 2", sft={"end_fill": 2})
    refused(r"data.dataset_name: out .* comes alone", dataset_name=["out", "a.jsonl"])
    refused(r"data.streaming: out", streaming=True)
    Path("other").mkdir()
    Path("other/notes.md").write_text("")
    for out, words in (("out", r"\(data.block_size: prepared 64"), ("other", r"\(notes.md\)")):
        with pytest.raises(UnmaskError, match=f"^{out}: has .*{words}"):
            prepare(recipe(max_records=8, block_size=32), out, shard_records=5)
    shard = Path("out/shard-00001.arrow")
    shard.write_bytes(shard.read_bytes()[::-1])
    refused(r"shard-00001.arrow: this shard is damaged")
    shard.unlink()
    refused(r"shard-00001.arrow: this shard is missing")
    Path("out/manifest.json").write_text('{"kind": "unmask encoded data"}')
    refused(r"out/manifest.json: cannot be used")


# Streams

MIX = [{"dataset_name": "a.jsonl", "weight": 3}, {"dataset_name": "b.jsonl", "weight": 1}]
STREAMS: dict[str, dict[str, Any]] = {
    "files": {"dataset_name": ["a.jsonl", "b.jsonl"], "shuffle_buffer": 6},
    "mixture": {"sources": MIX, "shuffle_buffer": 7},
    "mixture that stops": {"sources": MIX, "shuffle_buffer": 7, "on_source_end": "stop"},
    "packed": {"dataset_name": ["a.jsonl", "b.jsonl"], "shuffle_buffer": 6, "packing": True},
    "held out": {"dataset_name": ["a.jsonl", "b.jsonl"], "shuffle_buffer": 6, "eval_size": 3},
    "epochs": {"sources": [{**MIX[0], "epochs": 2}, {**MIX[1], "epochs": 1}], "shuffle_buffer": 7},
}


def rows_of(
    plan: Recipe, steps: range, rank: int = 0, ranks: int = 1, state: Any = None
) -> tuple[list[list[Any]], Any]:
    """(ids, sample id, epoch, place) of the examples of each step, and the state after them."""
    source = load_data(plan, run_tokenizer(plan)).steps(rank, ranks)
    if state is not None:
        source.load_state_dict(json.loads(json.dumps(state)))
    found = []
    for step in steps:
        if (units := source.at(step)) is None:
            break
        examples = [(example, unit) for unit in units for example in examples_of(unit.row)]
        found.append([(e.input_ids, e.sample_id, unit.epoch, unit.place) for e, unit in examples])
    return found, source.state_dict()


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_resumes_as_the_uninterrupted_one(name: str) -> None:
    plan = recipe(streaming=True, **STREAMS[name])
    for ranks in (1, 2):
        for rank in range(ranks):
            whole, _ = rows_of(plan, range(12), rank, ranks)
            for stop in (1, 2, 5):
                before, state = rows_of(plan, range(stop), rank, ranks)
                after, _ = rows_of(plan, range(stop, 12), rank, ranks, state)
                assert before + after == whole


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "packed"])
def test_a_stream_has_the_same_steps_on_any_number_of_processes(name: str) -> None:
    plan = recipe(streaming=True, **STREAMS[name])
    whole, _ = rows_of(plan, range(12))
    parts = [rows_of(plan, range(12), rank, 2)[0] for rank in (0, 1)]
    for step, units in enumerate(whole):
        assert sorted(parts[0][step] + parts[1][step], key=lambda unit: unit[3]) == units


def test_every_record_of_a_stream_comes_once_a_pass(tokenizer: PreTrainedTokenizerBase) -> None:
    plan = recipe(streaming=True, **{**STREAMS["files"], "shuffle_buffer": 5})
    for ranks in (1, 2):
        parts = [rows_of(plan, range(10), rank, ranks)[0] for rank in range(ranks)]
        seen = [(sample, epoch) for part in parts for step in part for _, sample, epoch, _ in step]
        assert len(seen) == len(set(seen)) == 40 and {epoch for _, epoch in seen} == {0, 1}
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    Dataset.from_list(records).save_to_disk("t")
    for name in ("t", "a.jsonl"):  # sample ids are those of a table
        plan = recipe(streaming=True, dataset_name=name, shuffle_buffer=4, eval_size=2)
        held_out = load_data(plan, tokenizer).held_out
        assert [example.record for example in held_out] == [0, 1]
        seen = {sample for step in rows_of(plan, range(2))[0] for _, sample, _, _ in step}
        whole = {example.sample_id for example in load_data(recipe(dataset_name=name), tokenizer).train}
        kept = {example.sample_id for example in held_out}
        assert kept | seen == whole and not kept & seen and len(whole) == 10
    ended, _ = rows_of(recipe(streaming=True, **STREAMS["epochs"]), range(20))
    assert len(ended) == 7  # 30 records: the last step would not be whole
    Path("array.json").write_text('[{"prompt": "q", "completion": "a"}]')
    with pytest.raises(UnmaskError, match=r"array.json: a JSON array cannot be streamed"):
        load_data(recipe(dataset_name="array.json", streaming=True), tokenizer)
