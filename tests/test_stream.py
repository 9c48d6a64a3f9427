"""Streams and mixtures: every way to read the same records must give the same examples."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from unmask.data.mixture import Taken, shares
from unmask.training.dataset import load_data

import unmask
from unmask.config import Recipe, recipe_from_dict
from unmask.data.collate import collate
from unmask.data.encode import EncodeReport, Example
from unmask.data.files import from_record_id, open_files, record_id
from unmask.data.stream import CHUNK, RecordStream, Share, StreamLoader
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError

PAD = partial(collate, pad_token_id=256)


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows_of(first: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}", "completion": f"{n}!"} for n in range(first, first + count)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 30 records, a folder of three files of 7, and text."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(lines(rows_of(0, 30)))
    Path("parts").mkdir()
    for number in range(3):
        Path(f"parts/{number}.jsonl").write_text(lines(rows_of(100 + 10 * number, 7)))
    texts = [{"text": " ".join([f"w{n}"] * (n % 9 + 1))} for n in range(25)]
    Path("text.jsonl").write_text(lines(texts))
    return tmp_path


def recipe(**data: Any) -> Recipe:
    mode = data.pop("training_mode", "sft")
    return recipe_from_dict(
        {
            "training_mode": mode,
            "seed": data.pop("seed", 3),
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {"block_size": 64, "streaming": True, **data},
        }
    )


def once(*names: str, **data: Any) -> dict[str, Any]:
    """Every source read once: a stream that ends."""
    return {"sources": [{"dataset_name": name, "epochs": 1} for name in names], **data}


def stream_of(**data: Any) -> RecordStream:
    stream = load_data(recipe(**data), byte_tokenizer()).stream
    assert stream is not None
    return stream


def key(example: Example) -> tuple[int, int, tuple[int, ...], tuple[bool, ...]]:
    return example.sample_id, example.epoch, tuple(example.input_ids), tuple(example.src_mask)


def read(stream: RecordStream, share: Share = Share(), batch_size: int = 1) -> list[Any]:  # noqa: B008
    return [
        [key(example) for example in ([row] if isinstance(row, Example) else row)]
        for row, _, _ in stream.rows(share=share, batch_size=batch_size)
    ]


def flat(rows: Sequence[Any]) -> Counter:
    return Counter(chain.from_iterable(rows))


# The same examples by every route.


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("window", [4, 10_000])
def test_streamed_equals_in_memory(packing: bool, window: int) -> None:
    plan = once("a.jsonl", "text2.jsonl", "parts", packing=packing)
    Path("text2.jsonl").write_text(lines(rows_of(50, 11)))
    streamed = flat(read(stream_of(**plan, shuffle_buffer=window)))
    assert streamed == flat(read(stream_of(**plan, streaming=False)))
    assert sum(streamed.values()) == len(streamed) == 62
    names = {"dataset_name": ["parts/2.jsonl", "a.jsonl", "parts/0.jsonl"]}
    train = load_data(recipe(**names, streaming=False), byte_tokenizer()).train
    whole = {(e.sample_id, tuple(e.input_ids), tuple(e.src_mask)) for e in train}
    several = islice(stream_of(**names, shuffle_buffer=window).rows(), 44)
    found = {(e.sample_id, tuple(e.input_ids), tuple(e.src_mask)) for e, _, _ in several}  # type: ignore
    assert found == whole and len(whole) == 44


@pytest.mark.parametrize("data", [{"packing": True}, {"packing": True, "long_documents": "cut"}])
def test_streamed_documents_equal_those_in_memory(data: dict[str, Any]) -> None:
    plan: dict[str, Any] = {"training_mode": "pretrain", "block_size": 16, **data}
    streamed = read(stream_of(**once("text.jsonl"), **plan, shuffle_buffer=5))
    memory = load_data(recipe(dataset_name="text.jsonl", **plan, streaming=False), byte_tokenizer()).train
    documents = {(example.sample_id, tuple(example.input_ids)) for example in memory}
    assert {(sample_id, ids) for row in streamed for sample_id, _, ids, _ in row} == documents
    assert len({sample_id for sample_id, _ in documents}) == len(memory) == sum(map(len, streamed))


def test_streamed_text_is_joined_within_a_window(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = stream_of(**once("text.jsonl"), training_mode="pretrain", block_size=16)
    rows: list[Any] = [row for row, _, _ in stream.rows()]
    assert sorted(len(row.input_ids) for row in rows)[1:] == [16] * (len(rows) - 1)
    texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text().splitlines()]
    ids = sorted(chain.from_iterable(row.input_ids for row in rows))
    end: Any = tokenizer.eos_token_id
    assert ids == sorted([*tokenizer.encode("".join(texts), add_special_tokens=False), *[end] * 24])
    assert len({row.sample_id for row in rows}) == len(rows)


@given(
    ranks=st.integers(1, 4),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    window=st.integers(1, 40),
    seed=st.integers(0, 5),
)
@settings(max_examples=25)
def test_any_ranks_and_workers_read_the_same(
    ranks: int, workers: int, batch_size: int, window: int, seed: int
) -> None:
    stream = stream_of(**once("a.jsonl", "parts"), shuffle_buffer=window, seed=seed)
    whole = list(chain.from_iterable(read(stream)))
    assert len(whole) == len(set(whole)) == 51
    parts = [
        [
            list(chain.from_iterable(read(stream, Share(r, ranks, w, workers), batch_size)))
            for w in range(workers)
        ]
        for r in range(ranks)
    ]
    assert Counter(chain.from_iterable(chain.from_iterable(parts))) == Counter(whole)
    for rank, of_rank in enumerate(parts):
        # Batches taken from the workers in turn are those of one worker, in their order.
        dealt = [
            [part[start : start + batch_size] for start in range(0, len(part), batch_size)]
            for part in of_rank
        ]
        turns = [dealt[b % workers][b // workers] for b in range(sum(map(len, dealt)))]
        assert list(chain.from_iterable(turns)) == whole[rank::ranks]


def endless_parts(**data: Any) -> RecordStream:
    """The folder's three files by URL, which are dealt out to up to three readers."""
    return stream_of(dataset_name=f"file://{Path('parts').resolve()}/*.jsonl", **data)


@given(
    who=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2), (3, 4)]),
    batch_size=st.integers(1, 3),
    window=st.integers(1, 30),
    seed=st.integers(0, 5),
)
@settings(max_examples=25)
def test_readers_with_files_of_their_own_miss_nothing(
    who: tuple[int, int], batch_size: int, window: int, seed: int
) -> None:
    ranks, workers = who
    stream = endless_parts(shuffle_buffer=window, seed=seed)
    found: Counter[tuple[int, int]] = Counter()
    files: dict[tuple[int, int], set[tuple[int, int]]] = {}  # of each reader, with the pass
    for rank in range(ranks):
        for worker in range(workers):
            rows = stream.rows(share=Share(rank, ranks, worker, workers), batch_size=batch_size)
            for row, _, _ in islice(rows, 120):
                assert isinstance(row, Example)
                if row.epoch == 2:
                    break
                found[row.epoch, row.sample_id] += 1
                files.setdefault((rank, worker), set()).add((row.epoch, row.sample_id >> 38))
    whole = {(row.epoch, row.sample_id) for row, _, _ in islice(stream.rows(), 42)}  # type: ignore
    assert found == dict.fromkeys(whole, 1) and len(whole) == 42
    if ranks * workers <= 3:  # nobody opens a file of another
        assert sum(map(len, files.values())) == 6


@given(point=st.integers(0, 60), who=st.sampled_from([Share(1, 2), Share(1, 3, 0, 2), Share(0, 1, 2, 3)]))
@settings(max_examples=15)
def test_a_reader_with_files_of_its_own_goes_on_where_it_was(point: int, who: Share) -> None:
    stream = endless_parts(shuffle_buffer=5)
    whole = [(row, after) for row, after, _ in islice(stream.rows(share=who), 65)]
    position = json.loads(json.dumps(whole[point - 1][1])) if point else None
    again = [row for row, _, _ in islice(stream.rows(position, who), 65 - point)]
    assert again == [row for row, _ in whole[point:]]


def test_weights_hold_for_readers_with_files_of_their_own_and_empty_files_are_passed_over() -> None:
    Path("more").mkdir()
    for number in range(4):
        Path(f"more/{number}.jsonl").write_text(lines(rows_of(200 + 10 * number, 9 * (number < 2))))
    sources = [
        {"dataset_name": f"file://{Path(name).resolve()}/*.jsonl", "weight": weight}
        for name, weight in (("parts", 1.0), ("more", 3.0))
    ]
    stream = stream_of(sources=sources, shuffle_buffer=20)
    for rank in range(3):
        rows = [row for row, _, _ in islice(stream.rows(share=Share(rank, 3)), 1000)]
        taken = [row.source for row in rows]  # type: ignore
        assert taken.count(0) / 1000 == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 1000) ** 0.5)
    for file in Path("more").iterdir():
        file.write_text("")
    with pytest.raises(UnmaskError, match=r"\*.jsonl: there is no record to train on: empty"):
        list(stream.mixture.windows(stream.mixture.start(), 2, 3))


def test_local_files_and_streams_that_end_are_not_dealt_out() -> None:
    url = f"file://{Path('parts').resolve()}/*.jsonl"
    assert endless_parts().mixture.may_split(3) and not endless_parts().mixture.may_split(4)
    assert not stream_of(dataset_name="parts").mixture.may_split(2)
    assert not stream_of(**once(url)).mixture.may_split(2)


@given(point=st.integers(0, 70), packing=st.booleans(), on_end=st.sampled_from(["repeat", "stop"]))
@settings(max_examples=20)
def test_resumed_equals_uninterrupted(point: int, packing: bool, on_end: str) -> None:
    names = [{"dataset_name": "a.jsonl"}, {"dataset_name": "parts", "weight": 2.5}]
    plan = {"sources": names, "on_source_end": on_end, "packing": packing}
    stream = stream_of(**plan, shuffle_buffer=16)
    share = Share(1, 2)
    whole = [(row, after) for row, after, _ in islice(stream.rows(share=share), 75)]
    position = json.loads(json.dumps(whole[point - 1][1])) if point else None
    again = [row for row, _, _ in islice(stream.rows(position, share), 75 - point)]
    assert again == [row for row, _ in whole[point:]]


def test_going_on_costs_no_encoding_of_earlier_windows() -> None:
    stream = stream_of(dataset_name="a.jsonl", shuffle_buffer=10)
    encoded: list[int] = []

    def encode(records: Sequence[Taken]) -> tuple[Sequence[Any], EncodeReport]:
        encoded.append(len(records))
        return stream.encode(records)

    counting = RecordStream(stream.mixture, encode)
    *_, (_, position, _) = islice(counting.rows(), 28)
    assert encoded == [10, 10, 10]
    encoded.clear()
    next(counting.rows(position))
    assert encoded == [10]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was(workers: int) -> None:
    stream = stream_of(dataset_name="a.jsonl", shuffle_buffer=16)

    def make(ranks: int = 2, workers: int = workers, stream: RecordStream = stream) -> StreamLoader:
        return StreamLoader(stream, PAD, batch_size=4, workers=workers, rank=1, ranks=ranks)

    one = make()
    whole = [batch["sample_ids"].tolist() for batch in islice(one, 9)]
    first = make()
    assert [batch["sample_ids"].tolist() for batch in islice(first, 5)] == whole[:5]
    state = json.loads(json.dumps(first.state()))
    second = make()
    second.load(state, "here")
    assert [batch["sample_ids"].tolist() for batch in islice(second, 4)] == whole[5:]
    assert second.counts == one.counts and second.counts[0][0] == 36
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ranks": 3}, "processes = 2; this one has 3"),
        ({"workers": 3}, "data.num_workers"),
        ({"stream": stream_of(dataset_name="a.jsonl", shuffle_buffer=9)}, "together = 16; this one has 9"),
        (
            {"stream": stream_of(dataset_name="a.jsonl", shuffle_buffer=16, seed=6)},
            "seed = 3; this one has 6",
        ),
    )
    for change, name in changes:
        with pytest.raises(UnmaskError, match=name):
            make(**change).load(state, "here")


def test_the_order_does_not_depend_on_workers() -> None:
    stream = stream_of(dataset_name="a.jsonl", shuffle_buffer=7)
    orders = [
        [b["sample_ids"].tolist() for b in islice(StreamLoader(stream, PAD, batch_size=4, workers=w), 12)]
        for w in (0, 2)
    ]
    assert orders[0] == orders[1]


# The order, and mixtures.


def test_every_pass_has_every_record_once_in_an_order_of_its_own() -> None:
    stream = stream_of(dataset_name="parts", shuffle_buffer=10_000)
    found = [(row.epoch, row.sample_id) for row, _, _ in islice(stream.rows(), 63)]  # type: ignore
    passes = [[i for e, i in found if e == epoch] for epoch in range(3)]
    assert all(len(set(one)) == len(one) == 21 for one in passes)
    assert [epoch for epoch, _ in found] == [0] * 21 + [1] * 21 + [2] * 21
    assert len({tuple(one) for one in passes}) == 3 and {frozenset(one) for one in passes} == {
        frozenset(passes[0])
    }
    files = [[i >> 38 for i in one] for one in _unshuffled("parts", 63)]
    assert len({tuple(dict.fromkeys(one)) for one in files}) > 1  # files in another order, too
    other = stream_of(dataset_name="parts", seed=4)
    assert [row.sample_id for row, _, _ in islice(other.rows(), 21)] != passes[0]  # type: ignore


def _unshuffled(name: str, count: int) -> list[list[int]]:
    rows = islice(stream_of(dataset_name=name, shuffle_buffer=1).rows(), count)
    found = [(row.epoch, row.sample_id) for row, _, _ in rows]  # type: ignore
    return [[i for e, i in found if e == epoch] for epoch in range(3)]


@pytest.mark.parametrize("streaming", [True, False])
def test_shares_follow_the_weights(streaming: bool) -> None:
    weights = {"a.jsonl": 1.0, "parts": 3.0}
    sources = [{"dataset_name": name, "weight": weight} for name, weight in weights.items()]
    stream = stream_of(sources=sources, streaming=streaming, **({"shuffle_buffer": 20} if streaming else {}))
    taken = [row.source for row, _, _ in islice(stream.rows(), 2000)]  # type: ignore
    assert taken.count(0) / 2000 == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2000) ** 0.5)
    epochs = Counter(row.epoch for row, _, _ in islice(stream.rows(), 2000) if row.source == 1)  # type: ignore
    assert epochs[0] == epochs[1] == 21  # "repeat": the small one starts again


def test_where_one_source_ends_the_epoch_of_the_mixture_may_end() -> None:
    sources = [{"dataset_name": "a.jsonl"}, {"dataset_name": "parts"}]
    stream = stream_of(sources=sources, on_source_end="stop", shuffle_buffer=1)
    found = [(row.source, row.epoch) for row, _, _ in islice(stream.rows(), 200)]  # type: ignore
    assert found == sorted(found, key=lambda pair: pair[1])  # both are in one epoch at a time
    counts = Counter(found)
    for epoch in range(3):
        assert counts[0, epoch] == 30 or counts[1, epoch] == 21
        assert 0 < counts[0, epoch] <= 30 and 0 < counts[1, epoch] <= 21


def test_a_source_with_epochs_leaves_the_mixture_after_them() -> None:
    sources = [{"dataset_name": "a.jsonl"}, {"dataset_name": "parts", "epochs": 2, "weight": 5}]
    for on_end in ("repeat", "stop"):
        stream = stream_of(sources=sources, on_source_end=on_end, shuffle_buffer=8)
        taken = Counter((row.source, row.epoch) for row, _, _ in islice(stream.rows(), 130))  # type: ignore
        assert taken[1, 0] == taken[1, 1] == 21 and taken[1, 2] == 0
        assert taken[0, 0] == taken[0, 1] == 30 and sum(taken.values()) == 130


def test_sources_have_formats_and_columns_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    Path("q.jsonl").write_text(lines([{"q": "Why", "a": "So", "text": 3}]))
    Path("m.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}])
    )
    custom = {"instruction_field": "q", "response_field": "a"}
    sources = [
        {"dataset_name": "q.jsonl", "format": "custom", "custom_format": custom},
        {"dataset_name": "m.json", "format": "messages"},
    ]
    loaded = load_data(recipe(sources=sources, streaming=False), tokenizer)
    assert [str(tokenizer.decode(e.input_ids)).split("\n")[1:4:2] for e in loaded.train] == [
        ["Why<|im_end|>", "So<|im_end|>"],
        ["x<|im_end|>", "y<|im_end|>"],
    ]
    assert [(e.sample_id, e.source) for e in loaded.train] == [(0, 0), (1 << 40, 1)]


def test_shares_are_said() -> None:
    assert shares([(3, 60), (1, 40)], ["a", "b"]).endswith("60.0% of the tokens; b 25.0%, 40.0%")
    assert "0.0%" in shares([(0, 0), (0, 0)], ["a", "b"])


# Every kind of file, read from the middle.


def test_every_kind_of_file_goes_on_from_any_record(place: Path) -> None:
    import fsspec

    rows = rows_of(0, 40)
    text = "\ufeff" + lines(rows[:20]) + "\r\n \n" + lines(rows[20:])
    Path("x.jsonl").write_text(text, encoding="utf-8")
    Path("x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.Table.from_pylist(rows), "x.parquet", row_group_size=7)
    Path("x.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows)
    )
    for suffix in ("jsonl", "parquet"):
        with fsspec.open(f"memory://bucket/x.{suffix}", "wb") as file:
            file.write(Path(f"x.{suffix}").read_bytes())  # type: ignore
    names = [
        "x.jsonl",
        "x.jsonl.gz",
        "x.parquet",
        "x.csv",
        "memory://bucket/x.jsonl",
        "memory://bucket/*.parquet",
    ]
    for name in names:
        [file] = open_files([name])
        whole = [(raw.record(), raw.where, at) for raw, at in file.read()]
        assert [record for record, _, _ in whole] == rows, name
        assert [at.number for _, _, at in whole] == list(range(1, 41))
        for point in (0, 6, 7, 20, 39):
            rest = [(raw.record(), raw.where, at) for raw, at in file.read(whole[point][2])]
            assert rest == whole[point + 1 :], (name, point)
    assert (
        next(iter(open_files(["memory://bucket/x.jsonl"])[0].read()))[0].where
        == "memory:///bucket/x.jsonl line 1"
    )


def test_hub_names_are_streamed_by_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    load = datasets.load_dataset
    files = sorted(str(path) for path in Path("parts").iterdir())
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, split, streaming: load("json", data_files=files, split=split, streaming=streaming),
    )
    stream = stream_of(**once("some/name"))
    local = stream_of(**once("parts"))
    assert len(stream.mixture.sources[0].files) == 3
    assert flat(read(stream)) == flat(read(local))
    rows = list(stream.rows())
    assert [row for row, _, _ in stream.rows(rows[12][1])] == [row for row, _, _ in rows[13:]]


def test_the_first_records_are_held_out_and_never_trained_on() -> None:
    loaded = load_data(recipe(dataset_name=["parts/0.jsonl", "parts/1.jsonl"], eval_size=9), byte_tokenizer())
    assert loaded.stream is not None
    held = {e.sample_id for e in loaded.held_out}
    assert len(held) == 9 == len(loaded.held_out)
    trained = {row.sample_id for row, _, _ in islice(loaded.stream.rows(), 40)}  # type: ignore
    assert len(trained) == 5 and not trained & held and {e.sample_id for e in loaded.train} == trained
    with pytest.raises(UnmaskError, match="only 30 records"):
        load_data(recipe(dataset_name="a.jsonl", eval_size=31), byte_tokenizer())
    with pytest.raises(UnmaskError, match=r"a.jsonl: there is no record to train on"):
        load_data(recipe(dataset_name="a.jsonl", eval_size=30), byte_tokenizer())


# Bad input.


def test_a_bad_line_far_into_a_stream(place: Path) -> None:
    text = lines(rows_of(0, CHUNK + 500)).splitlines(keepends=True)
    text.insert(CHUNK + 300, '{"prompt": \n')
    Path("long.jsonl").write_text("".join(text))
    where = f"long.jsonl line {CHUNK + 301}"
    plan = {**once("long.jsonl"), "shuffle_buffer": 50}
    with pytest.raises(UnmaskError, match=f"^{where}: not valid JSON"):
        read(stream_of(**plan))
    for workers in (0, 1):
        with pytest.raises(UnmaskError, match=f"^{where}: not valid JSON"):
            list(StreamLoader(stream_of(**plan), PAD, batch_size=4, workers=workers))
    loader = StreamLoader(stream_of(**plan, on_bad_record="skip"), PAD, batch_size=1)
    assert sum(len(batch["sample_ids"]) for batch in loader) == CHUNK + 500
    [((kind, reason), found)] = loader.left_out.items()
    assert (kind, reason, found) == ("skipped", "not valid JSON", (1, where))


@pytest.mark.parametrize("window", [3, 1000])
def test_of_a_broken_file_of_a_stream_the_rest_is_left_out_and_named(window: int) -> None:
    """In every pass again, whether a run goes on before or after the place."""
    text = lines(rows_of(300, 400))
    Path("parts/3.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-4])
    pq.write_table(pa.Table.from_pylist(rows_of(800, 5)), "parts/4.parquet")
    Path("parts/4.parquet").write_bytes(Path("parts/4.parquet").read_bytes()[:-5])
    with pytest.raises(UnmaskError, match=r"(3.jsonl.gz line 401: cannot|4.parquet: not a) "):
        read(stream_of(**once("parts"), shuffle_buffer=window))
    plan: dict[str, Any] = {"on_bad_record": "skip", "shuffle_buffer": window}
    stream = stream_of(**once("parts"), **plan)
    reports: list[EncodeReport] = []
    rows = []
    for row, after, told in stream.rows():
        rows.append((row, after))
        reports += told
    whole = EncodeReport()
    for report in reports:
        whole.merge(report)
    assert len(rows) == len({row.sample_id for row, _ in rows}) == 421  # type: ignore
    assert set(whole.skipped.items()) <= {
        ("cannot be decompressed: the rest of 3.jsonl.gz is left out", (1, "3.jsonl.gz line 401")),
        ("not a readable Parquet file: all of 4.parquet is left out", (1, "4.parquet")),
    }
    for point in range(0, 421, 60):
        again = [row for row, _, _ in stream.rows(json.loads(json.dumps(rows[point][1])))]
        assert again == [row for row, _ in rows[point + 1 :]]
    memory = load_data(recipe(dataset_name="parts", streaming=False, on_bad_record="skip"), byte_tokenizer())
    assert {e.sample_id for e in memory.train} == {row.sample_id for row, _ in rows}  # type: ignore
    assert memory.report is not None and len(memory.report.skipped) == 2


def test_a_file_that_goes_or_shrinks_during_the_run(place: Path) -> None:
    stream = stream_of(dataset_name="parts", shuffle_buffer=2)
    rows = stream.rows()
    _, position, _ = next(rows)
    *_, (_, later, _) = islice(rows, 9)
    Path("parts/0.jsonl").rename("elsewhere")
    with pytest.raises(UnmaskError, match=r"^0.jsonl: the file is gone; .* put it back") as caught:
        for _ in islice(stream.rows(position), 30):
            pass
    assert "\n" not in str(caught.value)
    Path("elsewhere").rename("parts/0.jsonl")
    for number in range(3):
        Path(f"parts/{number}.jsonl").write_text("{}\n")
    with pytest.raises(UnmaskError, match=r"jsonl: has 3 bytes, but \d+ have been read of it already"):
        list(islice(stream.rows(later), 30))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dataset_name": "x.json"}, "x.json: a JSON array cannot be streamed"),
        ({"dataset_name": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"dataset_name": "memory://nothing/x.jsonl"}, "memory://nothing/x.jsonl: no file matches"),
        ({"dataset_name": "nowhere://x.jsonl"}, "nowhere://x.jsonl: .*nowhere"),
        ({"dataset_name": "empty.jsonl"}, "empty.jsonl: there is no record to train on"),
        (
            {"sources": [{"dataset_name": "a.jsonl"}, {"dataset_name": "bad.jsonl"}]},
            "bad.jsonl line 1: no known format has these fields: x",
        ),
        (
            {
                "sources": [{"dataset_name": "a.jsonl"}, {"dataset_name": "bad.jsonl"}],
                "on_bad_record": "skip",
            },
            r"bad.jsonl: no record can be used: 2 skipped: no known format .*first: bad.jsonl line 1",
        ),
        (
            {
                "sources": [{"dataset_name": "a.jsonl"}, {"dataset_name": "bad.jsonl"}],
                "on_bad_record": "skip",
                "streaming": False,
            },
            r"bad.jsonl: no record can be used: 2 skipped: no known format .*first: bad.jsonl line 1",
        ),
    ],
)
def test_bad_sources_are_named(data: dict[str, Any], message: str) -> None:
    Path("x.json").write_text(json.dumps(rows_of(0, 2)))
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text(lines([{"x": 1}, {"x": 2}]))
    with pytest.raises(UnmaskError, match=message) as caught:
        load_data(recipe(**data), byte_tokenizer())
    assert "\n" not in str(caught.value)


def test_more_records_than_a_file_of_many_may_have() -> None:
    [file] = open_files(["a.jsonl"])
    files = [file] * 1025
    assert record_id(1024, 5, files) == 1024 << 29 | 5
    assert from_record_id(1024 << 29 | 5, 1025) == (1024, 5)
    with pytest.raises(UnmaskError, match="more than 536,870,912 records in one of 1,025 files"):
        record_id(0, 1 << 29, files)
    assert record_id(1024, (1 << 29) - 1, files) < 1 << 40


# Training from a stream.

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def training(out: str, **changes: Any) -> Recipe:
    data = {"streaming": True, "block_size": 64, "shuffle_buffer": 16, **changes.pop("data", {})}
    data.setdefault("sources", [{"dataset_name": "a.jsonl"}, {"dataset_name": "parts", "weight": 2}])
    tree: dict[str, Any] = {
        "training_mode": "sft",
        "seed": 5,
        "model": {"config": dict(MODEL), "tokenizer": "bytes"},
        "data": data,
        "global_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": None,
        "precision": "fp32",
        "optimizer": {"learning_rate": 5e-3, "epsilon": 1e-4},
        "log_steps": 1,
        "report_to": [],
        "checkpoint_save_dir": out,
    }
    return recipe_from_dict({**tree, **changes})


def train(plan: Recipe) -> str:
    console = Console(file=io.StringIO(), width=300, highlight=False)
    unmask.train(plan, console)
    return console.file.getvalue()  # type: ignore


def history(folder: str, step: int = 6) -> list[dict[str, float]]:
    state = json.loads(Path(folder, f"checkpoint-{step}", "trainer_state.json").read_text())
    return [
        {name: value for name, value in log.items() if name == "loss" or name.startswith("share/")}
        for log in state["log_history"]
        if "loss" in log
    ]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"num_workers": 2},
        {"packing": True, "num_workers": 2},
        {"streaming": False, "shuffle_buffer": 10_000},
    ],
    ids=["stream", "two workers", "packed", "in memory"],
)
def test_a_resumed_run_is_the_uninterrupted_one(data: dict[str, Any]) -> None:
    said = train(training("whole", data=data))
    resumed = train(training("resumed", data=data, resume_from_checkpoint="whole/checkpoint-4"))
    assert len(history("whole")) == 6 and history("resumed") == history("whole")
    assert Path("whole/checkpoint-4/data_position_0.json").stat().st_size < 3000
    last = [line for line in said.splitlines() if line.startswith(("taken from", "shares: "))]
    assert last == [line for line in resumed.splitlines() if line.startswith(("taken from", "shares: "))]
    assert (
        len(last) == 2
        and "tokens so far: a.jsonl " in said
        and set(history("whole")[0])
        == {
            "loss",
            "share/a.jsonl",
            "share/parts",
        }
    )


def test_workers_and_micro_batches_change_nothing() -> None:
    train(training("one"))
    train(training("workers", data={"num_workers": 2}))
    train(training("micro", micro_batch_size=2))
    assert history("workers") == history("one")
    for one, other in zip(history("one"), history("micro"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_what_a_position_does_not_fit_is_said() -> None:
    train(training("out"))
    for change, message in (
        ({"data": {"num_workers": 2}}, "data.num_workers = 1; this one has 2"),
        ({"seed": 6}, "seed was 5 and is now 6"),
        ({"data": {"shuffle_buffer": 9}}, "data.shuffle_buffer was 16 and is now 9"),
    ):
        with pytest.raises(UnmaskError, match=message) as caught:
            train(training("other", resume_from_checkpoint="out/checkpoint-4", **change))
        assert "\n" not in str(caught.value)
    Path("out/checkpoint-4/data_position_0.json").unlink()
    with pytest.raises(UnmaskError, match=r"data_position_0.json is missing"):
        train(training("other", resume_from_checkpoint="out/checkpoint-4"))


def test_a_stream_that_ends_ends_the_run_without_an_incomplete_step() -> None:
    sources = [{"dataset_name": "a.jsonl", "epochs": 1}]
    said = train(training("out", data={"sources": sources}, max_steps=50, eval_steps=None))
    assert "the data ended after step 7 of 50" in said and "taken from the stream: 28 examples" in said
    assert Path("out/final").exists()


def test_skipped_records_are_counted_at_the_end() -> None:
    Path("bad.jsonl").write_text(lines(rows_of(0, 8)) + "{\n" + lines(rows_of(8, 8)))
    data = {"sources": [{"dataset_name": "bad.jsonl", "epochs": 1}], "on_bad_record": "skip"}
    said = train(training("out", data=data, max_steps=50))
    assert said.count("1 skipped: not valid JSON (first: bad.jsonl line 9)") == 2  # before, and at the end


def test_two_processes_read_what_one_reads(place: Path) -> None:
    """The stream ends within a step, for one process before the other."""
    sources = [{"dataset_name": "a.jsonl", "epochs": 1}, {"dataset_name": "parts", "epochs": 1}]
    changes: dict[str, Any] = {"data": {"sources": sources}, "max_steps": 30, "save_steps": 12}
    train(training("one", **changes))
    plan = training("two", **changes, micro_batch_size=1)
    Path("recipe.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2".split()
    done = subprocess.run(
        [*launch, "-m", "unmask", "train", "recipe.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(unmask.__file__).parents[1])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "the data ended after step 12 of 30" in done.stdout
    assert done.stdout.count("taken from the stream: 48 examples") == 1
    for one, two in zip(history("one", 12), history("two", 12), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert len(list(Path("two/checkpoint-12").glob("data_position_*.json"))) == 2
