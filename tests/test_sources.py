from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from unmask.data.files import read_documents, read_records
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


def parquet(rows: list[dict[str, Any]], damaged_at: int | None = None) -> bytes:
    """A table of groups of two rows; of one group a page is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2, use_dictionary=False)
    data = bytearray(sink.getvalue().to_pybytes())
    if damaged_at is not None:
        table = pq.ParquetFile(pa.BufferReader(bytes(data)))
        column = table.metadata.row_group(damaged_at).column(0)
        start = column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    return bytes(data)


SIX = [{"instruction": f"say {i}", "output": "007"} for i in range(6)]
ARRAY = json.dumps(SIX)
CUT_GZIP = gzip.compress(lines(SIX * 500).encode())[:-4]  # in the checksum
RANDOM_GZIP = gzip.compress("".join(f'{{"a": "{n * n * 7919 % 99991}"}}\n' for n in range(2000)).encode())


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
