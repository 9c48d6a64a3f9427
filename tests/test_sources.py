from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from unmask.data.files import read_documents, read_records
from unmask.data.records import RecordError, to_conversation
from unmask.errors import UnmaskError

ROWS = [{"instruction": f"say {i}", "output": "007"} for i in range(3)]


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(name: str, **kwargs: Any) -> str:
    with pytest.raises(UnmaskError) as caught:
        list(read_records(name, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_array(tmp_path: Path) -> None:
    name = write(tmp_path / "x.json", json.dumps(ROWS, indent=1))
    assert list(read_records(name)) == [(r, f"x.json record {i}") for i, r in enumerate(ROWS, 1)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    text = lines(ROWS).encode()
    name = write(tmp_path / f"x{suffix}", gzip.compress(text) if "gz" in suffix else text)
    assert list(read_records(name)) == [(r, f"x{suffix} line {i}") for i, r in enumerate(ROWS, 1)]


def test_json_lines_with_bom_crlf_blank_lines_and_no_last_break(tmp_path: Path) -> None:
    text = '\ufeff{"a": "x\u2028y"}\r\n\r\n  \n{"a": "ä"}'
    for suffix in (".jsonl", ".json"):
        name = write(tmp_path / f"x{suffix}", text)
        found = [(record["a"], where) for record, where in read_records(name)]
        assert found == [("x\u2028y", f"x{suffix} line 1"), ("ä", f"x{suffix} line 4")]


def test_parquet_keeps_nested_fields(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row, row]), path)
    assert list(read_records(path)) == [(row, "x.parquet record 1"), (row, "x.parquet record 2")]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows([*ROWS, {"instruction": "two\nlines, NA", "output": ""}])
    records = [record for record, _ in read_records(path)]
    assert records == [*ROWS, {"instruction": "two\nlines, NA", "output": ""}]


def test_folder_glob_and_limit(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "b.jsonl", lines(ROWS[:1]))
    write(tmp_path / "a.json", json.dumps(ROWS[:2]))
    write(tmp_path / "sub" / "c.jsonl", lines(ROWS))
    write(tmp_path / ".hidden" / "d.jsonl", lines(ROWS))
    write(tmp_path / "notes.md", "no records")
    places = [where for _, where in read_records(tmp_path)]
    assert places[:3] == ["a.json record 1", "a.json record 2", "b.jsonl line 1"]
    assert places[3:] == [f"sub/c.jsonl line {i}" for i in (1, 2, 3)]
    assert len(list(read_records(tmp_path / "*.jsonl"))) == 1
    assert len(list(read_records(f"{tmp_path}/**/*.jsonl"))) == 4
    assert len(list(read_records(tmp_path, limit=4))) == 4
    assert list(read_records(tmp_path, limit=0)) == []


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        (
            "x.jsonl",
            '{"a": 1}\n{"a": \n',
            "x.jsonl line 2: not valid JSON (Expecting value, column",
        ),
        ("x.json", '[{"a": 1},\n {"a" 2}]', "x.json line 2: not valid JSON (Expecting ':'"),
        ("x.json", '{\n "a": 1\n}', "x.json line 1: not valid JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl line 2: expected a record {...}; got a list"),
        ("x.json", '[{"a": 1}, 7]', "x.json record 2: expected a record {...}; got 7"),
        ("x.jsonl", "", "x.jsonl: the file has no records"),
        ("x.json", "[]", "x.json: the file has no records"),
        ("x.csv", "a,b\n", "x.csv: the file has no records"),
        ("x.csv", "a,b\n1,2,3\n", "x.csv record 1: more cells than the header has names"),
        ("x.csv", 'a,b\n1,2\n"3,4\n', "x.csv record 2: not valid CSV"),
        ("x.csv", b"a\n\xff\n", "x.csv record 1: not UTF-8 text"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl line 2: not UTF-8 text"),
        ("x.json", b'[{"a": 1},\n{"a": "\xff"}]', "x.json line 2: not UTF-8 text"),
        ("x.jsonl.gz", "plain", "x.jsonl.gz record 1: cannot be decompressed (Not a gzipped file"),
        (
            "x.jsonl.gz",
            gzip.compress(b"{}\n" * 99, mtime=0)[:-9],
            "x.jsonl.gz record 1: cannot be decompressed",
        ),
        ("x.parquet", "no table", "x.parquet record 1: not a readable Parquet file"),
        ("x.txt", "text", "not a file of records; expected .json, .jsonl"),
    ],
)
def test_broken_files(tmp_path: Path, file: str, content: str | bytes, error: str) -> None:
    assert error in error_of(write(tmp_path / file, content))


def test_bad_records_and_broken_files_are_given_in_place(tmp_path: Path) -> None:
    """With `keep_bad` what is before the broken place is read, and the rest of the file named."""

    def read(file: str, data: bytes) -> list[Any]:
        found = read_records(write(tmp_path / file, data), keep_bad=True)
        return [record.counted if isinstance(record, RecordError) else record for record, _ in found]

    text = lines(ROWS * 500).encode()
    cut = read("x.jsonl.gz", gzip.compress(text, mtime=0)[:-200])  # less than one read of the file
    assert cut == ["cannot be decompressed: all of x.jsonl.gz is left out"]
    assert read("x.csv", b'a\n1\n"2\n') == [{"a": "1"}, "not valid CSV: the rest of x.csv is left out"]
    assert read("x.json", b'[{"a": 1},') == ["not valid JSON: all of x.json is left out"]
    assert read("x.jsonl", b'{"a": 1}\n7\n{"a": 1}\n') == [{"a": 1}, "expected a record {...}", {"a": 1}]


# Folders, splits and suffixes


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        (".ndjson", b'{"a": "1", "b": "x y"}\n'),
        (".jsonlines", b'{"a": "1", "b": "x y"}\n'),
        (".tsv", b"a\tb\n1\tx y\n"),
        (".json", b'[{"a": "1", "b": "x y"}]'),
    ],
)
@pytest.mark.parametrize(
    ("end", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_tables_by_suffix(tmp_path: Path, suffix: str, data: bytes, end: str, compress: Any) -> None:
    name = write(tmp_path / f"x{suffix}{end}", compress(data))
    assert [record for record, _ in read_records(name)] == [{"a": "1", "b": "x y"}]
    assert list(read_documents(name, text_field="b")) == ["x y"]  # not the file as one document


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.7z"])
def test_archives_are_refused(tmp_path: Path, name: str) -> None:
    assert "unpack it" in error_of(write(tmp_path / name, b"PK"))
    with pytest.raises(UnmaskError, match="unpack it"):
        list(read_documents(tmp_path / name))


def in_memory(path: Path) -> str:
    """Copy a folder to fsspec's memory, which is read as any store is."""
    import fsspec

    url = f"memory://{path.name}-{path.parent.name}"
    fsspec.filesystem("memory").put(str(path), url, recursive=True)
    return url


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("names", [("data/train-0.jsonl", "data/test-0.jsonl"), ("a.jsonl", "dev/a.jsonl")])
def test_a_folder_has_splits(tmp_path: Path, names: tuple[str, str], remote: bool) -> None:
    for number, name in enumerate(names):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "d" / name, lines(ROWS[number:]))
    folder = in_memory(tmp_path / "d") if remote else str(tmp_path / "d")
    other = "test" if "test" in names[1] else "validation"
    assert [record for record, _ in read_records(folder)] == ROWS
    assert [where for _, where in read_records(folder, split=other)] == [
        f"{names[1]} line {n}" for n in (1, 2)
    ]
    assert f"no split 'extra' (data.split); it has {', '.join(sorted(['train', other]))}" in error_of(
        folder, split="extra"
    )
    assert "remove data.split" in error_of(f"{folder}/{names[0]}", split="test")


def test_a_clone_of_a_hub_data_set_has_the_splits_of_its_card(tmp_path: Path) -> None:
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: one/*}\n"
    card += "  - {split: rest, path: b.jsonl}\n"
    (tmp_path / "one").mkdir()
    write(tmp_path / "README.md", f"---\n{card}---\n")
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / "one" / "a.jsonl", lines(ROWS))
    write(tmp_path / "b.jsonl", lines(ROWS[:1]))
    assert [len(list(read_records(tmp_path, split=split))) for split in ("train", "rest")] == [3, 1]
    assert "has no split 'test' (data.split); it has train, rest" in error_of(str(tmp_path), split="test")


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk(tmp_path: Path, splits: bool) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    (DatasetDict({"train": data, "test": data.select([0])}) if splits else data).save_to_disk(tmp_path / "d")
    assert [record for record, _ in read_records(tmp_path / "d")] == ROWS
    if splits:
        assert len(list(read_records(tmp_path / "d", split="test"))) == 1
        assert "it has train, test" in error_of(str(tmp_path / "d"), split="dev")


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("x.csv", "a,b,b\n1,2,3\n", "x.csv: column 'b' is given twice"),
        ("x.jsonl", '{"a": 1}\n{"m": [{"b": 1, "b": 2}]}\n', "x.jsonl line 2: key 'b' is given twice"),
        ("x.json", '[{"a": 1, "a": 2}]', "x.json record 1: key 'a' is given twice"),
    ],
)
def test_what_is_given_twice_is_refused(tmp_path: Path, name: str, data: str, named: str) -> None:
    assert named in error_of(write(tmp_path / name, data))


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_what_a_table_pads_is_not_there(tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    def called(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        properties = {name: {"type": "string"} for name in arguments}
        return {
            "messages": messages,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": properties}}],
        }

    rows = [called(city="Oslo"), called(a="1", b="2")]
    other = {"prompt": "q", "completion": "a"}
    nothing = {"prompt": None, "completion": None}
    data = Dataset.from_list([{**row, **nothing} for row in rows] + [other])
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x")
    data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    found = [to_conversation(record, where="x") for record, _ in read_records(path)]
    assert found == [to_conversation(record, where="x") for record in (*rows, other)]


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    missing = str(tmp_path / "trian.jsonl")
    nearest = tmp_path / "train.jsonl"
    assert error_of(missing) == f"{missing}: no such file; did you mean {nearest}?"
    assert error_of(str(tmp_path / "no" / "x.jsonl")).endswith(f"(nor a folder {tmp_path / 'no'}).")
    assert "no such file" in error_of("alpaca_of_nobody.json")
    assert "no such file" in error_of("./alpaca")
    assert "no file matches" in error_of(f"{tmp_path}/*.csv")
    (tmp_path / "empty").mkdir()
    assert "the folder has no file of a known kind" in error_of(str(tmp_path / "empty"))


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    assert error_of("some/data") == (
        "some/data: no such local file or folder, and the hub cannot be reached; give a local "
        "path, or set HF_HUB_OFFLINE=1 if it is in the hub cache."
    )


def test_hub_name_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("offline mode\nis enabled")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "cannot be loaded (split 'train'): offline mode." in error_of("some/data")


def test_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufeffone\ndocument\n")
    write(tmp_path / "b.jsonl", lines([{"text": "two"}, {"text": " "}, {"text": "three"}]))
    write(tmp_path / "c.txt", " ")
    write(tmp_path / "code.py", "print()")
    assert list(read_documents(tmp_path)) == ["one\ndocument\n", "two", "three"]
    assert list(read_documents(tmp_path, limit=2)) == ["one\ndocument\n", "two"]
    assert list(read_documents(tmp_path / "code.py")) == ["print()"]
    assert list(read_documents(tmp_path / "*.py")) == ["print()"]


def test_bad_documents(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"b\.txt line 1: not UTF-8 text \(byte 2"):
        list(read_documents(write(tmp_path / "b.txt", b"a\xff")))
    name = write(tmp_path / "c.jsonl", lines([{"body": "x"}]))
    with pytest.raises(UnmaskError, match=r"c\.jsonl line 1: field 'text' is missing; .*: body;"):
        list(read_documents(name))
    assert list(read_documents(name, text_field="body")) == ["x"]
