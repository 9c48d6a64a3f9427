"""What a whole file is that is not what its name says."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from unmask.data.records import READ

TABLES = {".csv": b",", ".tsv": b"\t"}  # with what is between their cells
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
WHOLE = 1 << 26  # bytes of a file that may be one JSON value over many lines
NAMES = re.compile(rb"\w[\w .-]{0,39}(?:([,;\t])\w[\w .-]{0,39})(?:\1\w[\w .-]{0,39})*")  # a table's header
FIELDS = {key for parts in READ.values() for keys in parts.values() for key in keys}


def is_doubtful(head: bytes, kind: str) -> bool:
    """Whether the beginning of a file is not that of its kind, so that `mistaken` is worth a second reading."""
    if _is_utf16(head):
        return True
    first = _first_line(head)
    if separator := TABLES.get(kind):
        return first[:1] in b"{[" or separator not in first
    if kind not in JSON_LINES and (kind != ".json" or first.startswith(b"[")):
        return False
    return not isinstance(_value(first), dict)


def mistaken(opened: BinaryIO, kind: str, name: str) -> tuple[str, str]:
    """What is wrong with a file as a whole, and how to mend it; ("", "") if nothing is known to be."""
    data = opened.read(WHOLE)
    first = _first_line(data)
    if _is_utf16(data):
        detail = f": the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {name} > new{kind}"
        return "not UTF-8 text", detail
    if kind in TABLES:
        return _table(first, kind, name)
    if first[:1] in b"{[":
        return _json(data, first, kind, name)
    if found := NAMES.fullmatch(first):
        end = ".tsv" if found[1] == b"\t" else ".csv"
        return "the file looks like a table, not JSON", f"; give it a name that ends in {end}"
    return "", ""


def _table(first: bytes, kind: str, name: str) -> tuple[str, str]:
    if isinstance(value := _value(first), dict | list):
        end = ".json" if isinstance(value, list) else ".jsonl"
        return "the file looks like JSON, not a table", f"; give it a name that ends in {end}"
    found = NAMES.fullmatch(first.replace(b'"', b""))
    if found and found[1] != TABLES[kind]:
        between = "tabs" if found[1] == b"\t" else f"'{found[1].decode()}'"
        todo = {b"\t": "name it .tsv", b",": "name it .csv"}.get(found[1], "save it with commas")
        return f"the cells are separated by {between}", f", not as in a {kind} file; {todo}"
    return "", ""


def _json(data: bytes, first: bytes, kind: str, name: str) -> tuple[str, str]:
    lines = first.split(b"\r")
    if len(lines) > 1 and b"\n" not in data.strip() and isinstance(_value(lines[0]), dict):
        return "the lines end in CR alone", f"; convert them: tr '\\r' '\\n' < {name} > new{kind}"
    try:
        text = data.decode("utf-8-sig").strip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "", ""
    if isinstance(value, list) and value and isinstance(value[0], dict) and end == len(text):
        detail = "; give it a name that ends in .json"
        return "the file is one JSON array", f"{detail}, as {kind} has one record a line"
    if not isinstance(value, dict) or "\n" not in text[:end]:
        return "", ""
    if text[end:].strip().startswith("{"):
        detail = f"; expected one record a line: jq -c . {name} > new.jsonl"
        return "a record is spread over several lines", detail
    if end < len(text):
        return "", ""
    inside = next((f"'{key}'" for key in value if key not in FIELDS and _is_records(value[key])), None)
    todo = f"save the list in {inside} alone as a .json file" if inside else "write it as a list: [{...}]"
    return "the file is one JSON object", f", not a list of records; {todo}"


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_utf16(data: bytes) -> bool:
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _first_line(data: bytes) -> bytes:
    return data.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0].rstrip()


def _value(text: bytes) -> Any:
    """What a JSON text says; None if it is not JSON."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
