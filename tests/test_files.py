"""From a file, folder or name to records and ids: what is text stays text, to the character, or is refused."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from unmask.config import recipe_from_dict
from unmask.data.dataset import RunData, load_data
from unmask.data.files import find_files, read_records
from unmask.data.records import RecordError, to_conversation
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError

ROWS = [{"instruction": f"say {i}", "output": "007"} for i in range(3)]
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, data: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return name


def lines(records: list[Any], newline: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + newline for record in records)


def put_table(kind: str, records: list[dict[str, str]], *, bom: bool = False, newline: str = "\n") -> str:
    """Write records of text to a file of the kind; returns its name."""
    name, mark = f"x{kind}", "\ufeff" if bom else ""
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), name)
    elif kind in (".csv", ".tsv"):
        quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in records]
        comma = "," if kind == ".csv" else "\t"
        put(name, mark + newline.join([comma.join(row) for row in [list(records[0]), *quoted]] + [""]))
    elif kind == ".json":
        put(name, mark + json.dumps(records, ensure_ascii=False, indent=1).replace("\n", newline))
    else:
        put(name, mark + lines(records, newline))
    return name


def read(name: str, **kwargs: Any) -> list[Any]:
    return [record for record, _ in read_records(name, **kwargs)]


def error_of(name: str, **kwargs: Any) -> str:
    with pytest.raises(UnmaskError) as caught:
        read(name, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


def loaded(name: str, mode: str = "sft", **data: Any) -> RunData:
    tree = {
        "training_mode": mode,
        "model": {"config": {}, "tokenizer": "bytes"},
        "data": {"dataset_name": name, "block_size": 1 << 21, **data},
    }
    return load_data(recipe_from_dict(tree), TOKENIZER)


def learnt(data: RunData) -> list[str]:
    """The supervised text of each example, without its end token."""
    pairs = [zip(row.input_ids, row.src_mask, strict=True) for row in data.train]
    texts = [str(TOKENIZER.decode([i for i, source in row if not source])) for row in pairs]
    return [text.removesuffix("<|im_end|>") for text in texts]


# Kinds of files

LINES = (".jsonl", ".ndjson", ".jsonlines")
KINDS = (*LINES, ".json", ".csv", ".tsv", ".parquet")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("end", ["", *COMPRESS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_with_its_locations(kind: str, end: str) -> None:
    name = put_table(kind, ROWS)
    if end:
        name = put(name + end, COMPRESS[end](Path(name).read_bytes()))
    word = "line" if kind in LINES else "record"
    assert list(read_records(name)) == [(row, f"{name} {word} {i}") for i, row in enumerate(ROWS, 1)]


def test_json_lines_in_a_json_file_count_blank_lines() -> None:
    name = put("x.json", '\ufeff{"a": "x\u2028y"}\r\n\r\n  \n{"a": "ä"}')
    assert list(read_records(name)) == [({"a": "x\u2028y"}, "x.json line 1"), ({"a": "ä"}, "x.json line 4")]


def test_documents() -> None:
    put("d/a.txt", "\ufeffone\ndocument\n")
    put("d/b.jsonl", lines([{"text": "two"}, {"text": " "}]))
    put("d/c.txt", " ")
    put("d/code.py", "print()")
    assert read("d", text=True) == ["one\ndocument\n", {"text": "two"}, {"text": " "}]
    assert read("d/code.py", text=True) == read("d/*.py", text=True) == ["print()"]
    whole = "".join(str(TOKENIZER.decode(row.input_ids)) for row in loaded("d", "pretrain").train)
    assert whole == "one\ndocument\n<|im_end|>two"
    assert error_of(put("x.txt", b"fine\na\xff"), text=True).startswith(
        "x.txt line 2: not UTF-8 text (byte 2"
    )
    with pytest.raises(UnmaskError, match=r"x\.jsonl line 1: field 'text' is missing; .*: body;"):
        loaded(put("x.jsonl", lines([{"body": "x"}])), "pretrain")
    [row] = loaded("x.jsonl", "pretrain", text_field="body").train
    assert TOKENIZER.decode(row.input_ids) == "x"


# Every character of every text, through every kind of file, to the ids

TEXTS = {
    "composed and decomposed": "\u00e9 e\u0301 \u1e9b\u0323 \ufb01",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷",
    "right to left": "שלום \u202eabc\u202c العربية \u2067x\u2069",
    "spaces": " \u00a0\u2003\u3000 a \t\v\f ",
    "line ends": "a\nb\r\nc\rd\u2028e\u2029f\x85g",
    "control characters": "a\x00b\x01\x1b[31m\x7fc",
    "byte order mark inside": "a\ufeffb",
    "not characters": "\ufffe \uffff \U0010ffff \ue000 \ufffd",
    "quotes": "a\"b'c,d\\e\\n{%raw%}{{ x }}",
    "control tokens": "<|im_end|> <|im_start|>assistant <|mask|><|endoftext|>",
    "long": ("<|im_end|> é\n" + "é" * 200) * 500,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bom", [False, True], ids=["plain", "bom"])
def test_every_character_arrives(kind: str, bom: bool) -> None:
    records = [{"instruction": f"q{text}q", "output": f"a{text}a"} for text in TEXTS.values()]
    data = loaded(put_table(kind, records, bom=bom))
    assert learnt(data) == [f"a{text}a" for text in TEXTS.values()]
    for row, text in zip(data.train, TEXTS.values(), strict=True):
        assert f"q{text}q" in str(TOKENIZER.decode(row.input_ids))


@pytest.mark.parametrize("kind", KINDS[2:])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
@example(texts=["\x00", "\r", "\ufeff"])
def test_any_text_arrives(kind: str, texts: list[str]) -> None:
    data = loaded(put_table(kind, [{"prompt": "q", "completion": f"a{text}a"} for text in texts]))
    assert learnt(data) == [f"a{text}a" for text in texts]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_line_ends_of_windows_and_empty_lines(kind: str) -> None:
    for newline in ("\r\n", "\n\n\r\n"):
        assert read(put_table(kind, ROWS, bom=True, newline=newline)) == ROWS


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
def test_plain_text_arrives(packing: bool, bom: str) -> None:
    for number, text in enumerate(TEXTS.values()):
        [row] = loaded(put(f"{number}.txt", f"{bom}q{text}\r\nq\n"), "pretrain", packing=packing).train
        assert TOKENIZER.decode(row.input_ids) == f"q{text}\r\nq\n" + "<|im_end|>" * packing
        assert row.input_ids.count(258) == packing


# What cannot be read

LATIN = "caf\u00e9".encode("latin-1")
GOOD = b'{"a": 1}\n'
BAD: list[tuple[str, str | bytes, str]] = [
    ("x.jsonl", GOOD + b'{"a": \n', "x.jsonl line 2: not valid JSON (Expecting value, column"),
    ("x.jsonl", GOOD + b'\x00{"a": 1}', "x.jsonl line 2: not valid JSON"),
    ("x.jsonl", GOOD + b'{"a": "\x00"}', "x.jsonl line 2: not valid JSON"),
    ("x.jsonl", GOOD + b"[" * 100_000, "x.jsonl line 2: not valid JSON"),
    ("x.jsonl", GOOD + b'{"n": ' + b"1" * 5000 + b"}", "x.jsonl line 2: not valid JSON"),
    ("x.jsonl", GOOD + b'{"a": 1}{"a": 1}', "x.jsonl line 2: not valid JSON (Extra data"),
    ("x.jsonl", GOOD + b'{"a": "' + LATIN + b'"}', "x.jsonl line 2: not UTF-8 text (byte 11"),
    ("x.jsonl", GOOD + b"[1]\n", "x.jsonl line 2: expected a record {...}; got a list"),
    ("x.jsonl", GOOD + b'{"m": [{"b": 1, "b": 2}]}\n', "x.jsonl line 2: key 'b' is given twice"),
    (
        "x.jsonl",
        GOOD.decode().encode("utf-16"),
        "x.jsonl: not UTF-8 text: the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 x.jsonl > new.jsonl",
    ),
    ("x.jsonl", "", "x.jsonl: the file has no records"),
    ("x.json", '[{"a": 1},\n {"a" 2}]', "x.json line 2: not valid JSON (Expecting ':'"),
    (
        "x.json",
        '{\n "a": 1\n}',
        "x.json: the file is one JSON object, not a list of records; write it as a list: [{...}]",
    ),
    ("x.json", '[{"a": 1}, 7]', "x.json record 2: expected a record {...}; got 7"),
    ("x.json", b'[{"a": 1},\n{"a": "\xff"}]', "x.json line 2: not UTF-8 text"),
    ("x.json", '[{"a": 1, "a": 2}]', "x.json: key 'a' is given twice"),
    ("x.json", b"[" * 100_000, "x.json: not valid JSON"),
    ("x.json", "[]", "x.json: the file has no records"),
    ("x.csv", "a,b\n", "x.csv: the file has no records"),
    ("x.csv", "a,b,b\n1,2,3\n", "x.csv: column 'b' is given twice"),
    ("x.csv", "a,b\n1,2,3\n", "x.csv record 1: more cells than the header has names"),
    ("x.csv", 'a,b\n1,2\n"3,4\n', "x.csv record 2: not a readable .csv file"),
    ("x.csv", b"a\n1\n" + LATIN + b"\n", "x.csv record 2: not UTF-8 text"),
    ("x.jsonl.gz", "plain", "x.jsonl.gz: not a readable .jsonl file (Not a gzipped file"),
    ("x.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-9], "x.jsonl.gz: not a readable .jsonl file"),
    ("x.parquet", "no table", "x.parquet: not a readable .parquet file"),
    ("x.csv", "\ufeffa,b\n1,2\n".encode("utf-16-be"), "x.csv: not UTF-8 text: the file is UTF-16"),
    ("x.json", '{"data":\n [{"a": 1},\n {"a": 2}]}\n', "save the list in 'data' alone as a .json file"),
    (
        "x.json",
        '{"n": 1,\n "messages": [{"role": "user"}]}',
        "x.json: the file is one JSON object, not a list",
    ),
    (
        "x.jsonl",
        '[\n {"a": 1},\n {"a": 2}]',
        "x.jsonl: the file is one JSON array; give it a name that ends in .json",
    ),
    ("x.jsonl", '[{"a": 1}, {"a": 2}]', "x.jsonl: the file is one JSON array"),
    (
        "x.jsonl.gz",
        gzip.compress(b'[{"a": 1},\n {"a": 2}]', mtime=0),
        "x.jsonl.gz: the file is one JSON array",
    ),
    (
        "x.jsonl",
        '{\n "a": 1\n}\n{\n "a": 2\n}\n',
        "spread over several lines; expected one record a line: jq -c",
    ),
    (
        "x.jsonl",
        '{"a": 1}\r{"a": 2}\r',
        "the lines end in CR alone; convert them: tr '\\r' '\\n' < x.jsonl > new.jsonl",
    ),
    (
        "x.jsonl",
        "instruction,output\na,b\n",
        "looks like a table, not JSON; give it a name that ends in .csv",
    ),
    (
        "x.jsonl",
        "instruction\toutput\na\tb\n",
        "looks like a table, not JSON; give it a name that ends in .tsv",
    ),
    (
        "x.csv",
        '{"a": 1}\n{"a": 2}\n',
        "x.csv: the file looks like JSON, not a table; give it a name that ends in .jsonl",
    ),
    ("x.csv", '[{"a": 1}]\n', "give it a name that ends in .json."),
    (
        "x.csv",
        'instruction;"output"\na;b\n',
        "the cells are separated by ';', not as in a .csv file; save it with commas",
    ),
    (
        "x.csv",
        "instruction\toutput\na\tb\n",
        "the cells are separated by tabs, not as in a .csv file; name it .tsv",
    ),
    (
        "x.tsv",
        "instruction,output\na,b\n",
        "the cells are separated by ',', not as in a .tsv file; name it .csv",
    ),
    ("x.txt", "text", "not a file of records; expected .json, .jsonl"),
    *((name, b"PK", "unpack it") for name in ("x.zip", "x.tar.gz", "x.7z")),
]


@pytest.mark.parametrize(("name", "content", "error"), BAD)
def test_what_cannot_be_read_is_refused_with_its_location(
    name: str, content: str | bytes, error: str
) -> None:
    assert error in error_of(put(name, content))
    if "unpack it" in error:
        assert error in error_of(name, text=True)


def test_bad_records_and_broken_files_are_given_in_place() -> None:
    """What is before the broken place is read, and the rest of the file named."""

    def kept(name: str, data: bytes) -> list[Any]:
        found = [record.load() for file in find_files(put(name, data)) for record in file.read()]
        return [record.counted if isinstance(record, RecordError) else record for record in found]

    cut = kept("x.jsonl.gz", gzip.compress(GOOD * 1500, mtime=0)[:-20])  # less than one read of the file
    assert cut == ["not a readable .jsonl file: all of x.jsonl.gz is left out"]
    broken = "not a readable .csv file: the rest of x.csv is left out"
    assert kept("x.csv", b'a\n1\n"2\n') == [{"a": "1"}, broken]
    assert kept("x.json", b'[{"a": 1},') == ["not valid JSON: all of x.json is left out"]
    assert kept("x.jsonl", GOOD + b"7\n" + GOOD) == [{"a": 1}, "expected a record {...}", {"a": 1}]


def test_every_bad_record_is_counted_and_the_rest_is_as_without_them() -> None:
    good = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(100)]
    bad = [b"{", b"[]", b'{"prompt": 1, "completion": "a"}', b'{"prompt": "q", "completion": " "}', LATIN]
    written = [json.dumps(record).encode() for record in good]
    for index, line in enumerate(bad * 5):
        written.insert(index * 4, line)
    data = loaded(put("x.jsonl", b"\n".join(written)), on_bad_record="skip")
    whole = loaded(put("good.jsonl", lines(good)))
    assert [row.input_ids for row in data.train] == [row.input_ids for row in whole.train]
    assert data.report is not None and (data.report.kept, data.report.records) == (100, 125)
    assert data.report.skipped == {
        "not valid JSON": (5, "x.jsonl line 1"),
        "expected a record {...}": (5, "x.jsonl line 5"),
        "field 'prompt' must be text": (5, "x.jsonl line 9"),
        "field 'completion' is empty": (5, "x.jsonl line 13"),
        "not UTF-8 text": (5, "x.jsonl line 17"),
    }
    # Numbers count the bad ones too.
    assert [row.record for row in data.train] == [n for n, line in enumerate(written) if line not in bad]


# Folders, splits and names


def test_folder_glob_and_limit() -> None:
    put("d/b.jsonl", lines(ROWS[:1]))
    put("d/a.json", json.dumps(ROWS[:2]))
    put("d/sub/c.jsonl", lines(ROWS))
    put("d/.hidden/d.jsonl", lines(ROWS))
    put("d/notes.md", "no records")
    locations = [where for _, where in read_records("d")]
    assert locations[:3] == ["a.json record 1", "a.json record 2", "b.jsonl line 1"]
    assert locations[3:] == [f"sub/c.jsonl line {i}" for i in (1, 2, 3)]
    assert len(read("d/*.jsonl")) == 1
    assert len(read("d/**/*.jsonl")) == len(read("d", limit=4)) == 4
    assert read("d", limit=0) == []


def in_memory(path: Path) -> str:
    """Copy a folder to fsspec's memory, which is read as any store is."""
    import fsspec

    url = f"memory://{path.name}-{path.parent.name}"
    fsspec.filesystem("memory").put(str(path), url, recursive=True)
    return url


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("names", [("data/train-0.jsonl", "data/test-0.jsonl"), ("a.jsonl", "dev/a.jsonl")])
def test_a_folder_has_splits(folder: Path, names: tuple[str, str], remote: bool) -> None:
    for number, name in enumerate(names):
        put(f"d/{name}", lines(ROWS[number:]))
    name = in_memory(folder / "d") if remote else "d"
    other = "test" if "test" in names[1] else "validation"
    assert read(name) == ROWS
    assert [where for _, where in read_records(name, split=other)] == [f"{names[1]} line {n}" for n in (1, 2)]
    there = ", ".join(sorted(["train", other]))
    assert f"no split 'extra' (data.split); it has {there}" in error_of(name, split="extra")
    assert "remove data.split" in error_of(f"{name}/{names[0]}", split="test")


def test_a_clone_of_a_hub_data_set_has_the_splits_of_its_card() -> None:
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: one/*}\n"
    put("d/README.md", f"---\n{card}  - {{split: rest, path: b.jsonl}}\n---\n")
    put("d/dataset_infos.json", "{}")
    put("d/one/a.jsonl", lines(ROWS))
    put("d/b.jsonl", lines(ROWS[:1]))
    assert [len(read("d", split=split)) for split in ("train", "rest")] == [3, 1]
    assert "has no split 'test' (data.split); it has train, rest" in error_of("d", split="test")


def test_a_folder_of_save_to_disk() -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk("one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk("two")
    assert read("one") == read("two") == ROWS
    assert len(read("two", split="test")) == 1
    assert "it has train, test" in error_of("two", split="dev")


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_what_a_table_pads_is_not_there(kind: str) -> None:
    def called(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        properties = {name: {"type": "string"} for name in arguments}
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        tool = {"type": "function", "function": {"name": "f", "parameters": properties}}
        return {"messages": turns, "tools": [tool]}

    rows = [called(city="Oslo"), called(a="1", b="2")]
    other = {"prompt": "q", "completion": "a"}
    data = Dataset.from_list([{**row, "prompt": None, "completion": None} for row in rows] + [other])
    data.to_parquet("x.parquet") if kind == "parquet" else data.save_to_disk("x")
    found = [to_conversation(record, where="x") for record in read("x.parquet" if kind == "parquet" else "x")]
    assert found == [to_conversation(record, where="x") for record in (*rows, other)]


def test_missing_files(folder: Path) -> None:
    put("train.jsonl", lines(ROWS))
    assert error_of("trian.jsonl") == "trian.jsonl: no such file; did you mean train.jsonl?"
    assert error_of("no/x.jsonl").endswith("(nor a folder no).")
    assert "no such file" in error_of("alpaca_of_nobody.json")
    assert "no such file" in error_of("./alpaca")
    assert "no file matches" in error_of("*.csv")
    Path("dangling.jsonl").symlink_to("gone.jsonl")
    assert (
        error_of("dangling.jsonl")
        == "dangling.jsonl: no such file: a link to gone.jsonl, which is not there."
    )
    assert "dangling" not in error_of("dangli.jsonl").partition(": ")[2]
    (folder / "empty").mkdir()
    assert "the folder has no file of a known kind" in error_of("empty")


def test_a_file_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "x.jsonl")

    put("x.jsonl", lines(ROWS))
    monkeypatch.setattr(fsspec, "open", refuse)  # who runs the tests may be root, who may read everything
    assert "x.jsonl: permission denied; allow it (chmod u+r " in error_of("x.jsonl")


def test_what_is_sound_is_not_taken_for_another_kind() -> None:
    """One column, a first line longer than a buffer, records with lists, and a first record that alone is bad."""
    assert read(put("x.csv", "text\na;b\n")) == [{"text": "a;b"}]
    long = {"a": "x" * (3 << 20)}
    assert read(put("x.jsonl", lines([long]))) == [long]
    assert read(put("x.jsonl.gz", gzip.compress(lines([long, {"b": [{}]}]).encode()))) == [long, {"b": [{}]}]
    assert error_of(put("x.jsonl", "words, words\n" + lines(ROWS))).startswith(
        "x.jsonl line 1: not valid JSON"
    )
    assert read(put("x.csv", '{"text"}\na\n')) == [{'{"text"}': "a"}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_is_opened_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, stock = [], fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda *args, **more: opened.append(args) or stock(*args, **more))
    assert read(put_table(kind, ROWS, bom=kind != ".parquet")) == ROWS
    assert len(opened) == 1
