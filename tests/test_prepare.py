"""Prepared and encoded on the fly, interrupted and not, one process and several: the same data."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from unmask.data.manifest import PROGRESS, fingerprint, read_manifest
from unmask.data.prepared import PreparedExamples, open_prepared
from unmask.training.dataset import load_data
from unmask.training.prepare import prepare

import unmask
from unmask import byte_tokenizer
from unmask.cli import main
from unmask.config import Recipe, recipe_from_dict
from unmask.data import manifest
from unmask.data import prepare as module
from unmask.data.collate import PackedRows
from unmask.data.encode import EncodeReport, Example
from unmask.errors import UnmaskError

QUIET = Console(file=io.StringIO())
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of records, some of which are cut, dropped or bad, and of texts."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("a.jsonl", 0), ("b.jsonl", 30)):
        records: list[dict[str, Any]] = [
            {"prompt": f"Say {n} <|im_end|>", "completion": f"{n}! " * (n % 9 + 1)}
            for n in range(first, first + 30)
        ]
        records[4] = {"instruction": "q" * 80, "output": "too long a question"}
        records[7] = {"messages": [{"role": r, "content": f"{r} \n"} for r in ("user", "assistant", "user")]}
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    Path("bad.jsonl").write_text(
        "".join([*lines[:5], "{no json\n", '{"prompt": "p", "completion": 3}\n', *lines[5:]])
    )
    documents = [{"text": " ".join(WORDS[: n % 12 + 1]) + "." * (n % 5)} for n in range(40)]
    documents[3] = {"text": "long " * 30 + "<|mask|>"}
    documents[9] = {"text": "  "}
    Path("text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    Path("one.txt").write_text("abcdefghij" * 5)
    return tmp_path


def recipe(mode: str = "sft", **data: Any) -> Recipe:
    data.setdefault("dataset_name", "a.jsonl" if mode == "sft" else "text.jsonl")
    if data["dataset_name"] is None:
        del data["dataset_name"]
    return recipe_from_dict(
        {
            "training_mode": mode,
            "model": {"config": {}, "tokenizer": "bytes"},
            "data": {"block_size": 64, **data},
        }
    )


CASES: dict[str, Recipe | Callable[[], Recipe]] = {
    "sft": lambda: recipe(),
    "several files": lambda: recipe(dataset_name=["a.jsonl", "b.jsonl"]),
    "settings": lambda: recipe(
        sft={"end_fill": 8, "layout": "separator", "train_on": "last"}, max_records=23
    ),
    "skip": lambda: recipe(dataset_name="bad.jsonl", on_bad_record="skip"),
    "dropped": lambda: recipe(sft={"too_long": "drop"}),
    "text": lambda: recipe("pretrain", block_size=16),
    "text and files": lambda: recipe(
        "pretrain", dataset_name=["one.txt", "text.jsonl"], block_size=10, max_records=9
    ),
    "whole blocks": lambda: recipe("pretrain", dataset_name="one.txt", block_size=10),
    "packed text": lambda: recipe("pretrain", packing=True),
    "packed text, cut": lambda: recipe("pretrain", packing=True, long_documents="cut", block_size=20),
}


def prepared(plan: Recipe, out: str = "out", **settings: Any) -> Path:
    prepare(plan, out, console=QUIET, **{"workers": 1, "shard_records": 7, **settings})
    return Path(out)


def from_prepared(plan: Recipe, out: str | Path = "out", **data: Any) -> Recipe:
    return plan.model_copy(update={"data": plan.data.model_copy(update={"dataset_name": str(out), **data})})


def contents(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_prepared_and_on_the_fly_are_the_same(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    plan = CASES[name]()  # pyright: ignore[reportCallIssue]
    expected = load_data(plan, tokenizer)
    prepared(plan)
    assert len(list(Path("out").glob("shard-*"))) > (1 if name not in ("whole blocks",) else 0)
    found = load_data(from_prepared(plan), tokenizer)
    assert isinstance(found.train, PreparedExamples) and len(found.train) == len(expected.train) > 3
    assert list(found.train) == list(expected.train)
    assert found.report == expected.report
    assert found.totals() == expected.totals()
    assert (found.encoder is None) == (expected.encoder is None)


def test_the_end_is_held_out_and_rows_are_packed(tokenizer: PreTrainedTokenizerBase) -> None:
    plan = recipe(packing=True, eval_size=5)
    prepared(plan)
    expected, found = load_data(plan, tokenizer), load_data(from_prepared(plan), tokenizer)
    assert list(found.held_out) == list(expected.held_out) and len(found.held_out) == 5
    assert list(found.rows) == list(expected.rows)
    assert isinstance(found.rows, PackedRows) and found.rows[1:3] == expected.rows[1:3]
    assert found.row_length == expected.row_length
    assert found.totals() == expected.totals()


def test_prepared_folders_are_sources_of_a_mixture_and_stay_on_disk(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.jsonl", "b.jsonl"]
    plan = recipe(dataset_name=None, sources=[{"dataset_name": name, "weight": 2.0} for name in names])
    for name in names:
        prepared(recipe(dataset_name=name), f"out-{name}")
    expected = load_data(plan, tokenizer)
    sources = [{"dataset_name": f"out-{name}", "weight": 2.0} for name in names]
    asked: list[Any] = []
    original = PreparedExamples.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(PreparedExamples, "__getitem__", lambda *at: asked.append(at) or original(*at))
        found = load_data(recipe(dataset_name=None, sources=sources), tokenizer)
        assert found.totals() == expected.totals() and not asked
        assert found.stream is not None and expected.stream is not None
        rows = [row for row, _, _ in islice(found.stream.rows(), 80)]
        assert len(asked) < 1000
    assert rows == [row for row, _, _ in islice(expected.stream.rows(), 80)]
    assert list(found.train) == list(expected.train) and found.train[-1] == expected.train[-1]
    assert found.train[20:40:3] == expected.train[20:40:3] and {row.source for row in found.train} == {0, 1}
    packed = {"dataset_name": None, "packing": True}
    one = load_data(recipe(**packed, sources=sources), tokenizer)
    other = load_data(recipe(**packed, sources=[{"dataset_name": name} for name in names]), tokenizer)
    assert isinstance(one.rows, PackedRows) and list(one.rows) == list(other.rows)


@pytest.mark.parametrize("name", ["several files", "text", "packed text"])
def test_any_number_of_processes_writes_the_same_bytes(name: str) -> None:
    plan = CASES[name]()  # pyright: ignore[reportCallIssue]
    one = contents(prepared(plan, "one"))
    assert contents(prepared(plan, "three", workers=3)) == one
    assert "manifest.json" in one and PROGRESS not in one


@pytest.mark.parametrize("name", ["several files", "text", "packed text"])
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_comes_to_the_same_bytes(
    name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = CASES[name]()  # pyright: ignore[reportCallIssue]
    whole = contents(prepared(plan, "whole"))

    def killed(at: int) -> None:
        """A run in a process of its own that ends by SIGKILL before its `at`-th change of the folder."""
        changes = 0

        def replace(*paths: Any) -> None:
            nonlocal changes
            changes += 1
            if changes > at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.rename(*paths)

        monkeypatch.setattr(module.os, "replace", replace)
        prepared(plan, "killed", workers=workers)

    for at in (0, 1, 3, 2, 4):
        process = multiprocessing.get_context("fork").Process(target=killed, args=(at,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(UnmaskError, match=r"killed: the preparation was interrupted; run the same"):
            open_prepared("killed")
    kept = {file: file.stat().st_mtime_ns for file in Path("killed").glob("shard-*")}
    assert len(kept) > 2
    prepared(plan, "killed", workers=workers)
    assert contents("killed") == whole
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_ctrl_c_leaves_finished_shards_and_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(prepared(recipe(), "whole"))
    closed = 0
    original = module._Writer._close_shard

    def close(self: Any) -> None:
        nonlocal closed
        closed += 1
        if closed == 3:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Writer, "_close_shard", close)
        prepared(recipe(), workers=2)
    assert sorted(contents("out")) == [PROGRESS, "shard-00000.parquet", "shard-00001.parquet"]
    prepared(recipe())
    assert contents("out") == whole


def test_a_full_disk_is_one_line_and_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(recipe().to_yaml())
    whole = contents(prepared(recipe(), "whole", shard_records=module.SHARD))
    original = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".parquet"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        original(source, target)

    monkeypatch.setattr(module.os, "replace", full)
    monkeypatch.setattr("sys.argv", ["unmask", "prepare", "recipe.yaml", "out", "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "out: cannot be written: no space left on the disk; the 0 finished" in error
    )
    assert sorted(contents("out")) == [PROGRESS]
    monkeypatch.setattr(module.os, "replace", original)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "29 sequences of 30 records, " in capsys.readouterr().out
    assert contents("out") == whole


def test_a_finished_shard_that_is_damaged_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(prepared(recipe(), "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(module._Writer, "close", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe())
    assert len(contents("out")) == 5
    damage(Path("out/shard-00002.parquet"))
    prepared(recipe())
    assert contents("out") == whole


def test_a_finished_folder_is_left_alone() -> None:
    before = contents(prepared(recipe()))
    shutil.copy("out/manifest.json", f"out/{PROGRESS}")  # killed between the two last steps
    prepared(recipe())
    assert contents("out") == before
    damage(Path("out/shard-00001.parquet"))
    with pytest.raises(UnmaskError, match=r"out/shard-00001.parquet: this shard of prepared data is damaged"):
        prepared(recipe())


def damage(file: Path) -> None:
    """Turn one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1
    file.write_bytes(data)


def test_another_preparation_in_the_same_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(recipe())
    with pytest.raises(UnmaskError) as caught:
        prepared(recipe(dataset_name="b.jsonl", sft={"end_fill": 4}))
    assert str(caught.value) == (
        "out: holds data prepared otherwise (data.sft.end_fill: prepared 1, now 4; data.dataset_name:"
        ' prepared ["a.jsonl"], now ["b.jsonl"]; files: prepared ["a.jsonl"], now ["b.jsonl"]); name another'
        " folder, or remove this one."
    )
    os.rename("out/manifest.json", "manifest.json")
    head = {
        "kind": manifest.KIND,
        "version": manifest.VERSION,
        "identity": read_manifest(Path()).identity,
        "inputs": {},
    }
    Path(f"out/{PROGRESS}").write_text(json.dumps(head) + "\n")
    with pytest.raises(UnmaskError, match=r"data.sft.end_fill: prepared 1, now 4"):
        prepared(recipe(sft={"end_fill": 4}))


def test_two_preparations_at_once_are_refused_and_a_lock_that_was_left_is_not() -> None:
    whole = contents(prepared(recipe(), "whole"))
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()

    def slow() -> None:
        def wait(*_: Any) -> None:
            begun.set()
            go_on.wait(60)

        module._Writer.close = wait  # pyright: ignore[reportAttributeAccessIssue]
        prepared(recipe(), workers=2)

    process = context.Process(target=slow)
    process.start()
    assert begun.wait(60)
    with pytest.raises(UnmaskError) as caught:
        prepared(recipe())
    assert str(caught.value) == (
        f"out: process {process.pid} on {platform.node()} is preparing data here at this moment; wait until"
        " it is done, or name another folder."
    )
    process.kill()
    process.join()
    assert module.LOCK in contents("out")  # nobody's
    prepared(recipe())
    assert contents("out") == whole


def test_a_folder_of_other_things_is_refused() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(UnmaskError, match=r"out: holds other things \(mine.txt\); name another folder"):
        prepared(recipe())
    assert contents("out") == {"mine.txt": b"mine"}
    with pytest.raises(UnmaskError, match=r"a.jsonl: cannot be written: "):
        prepared(recipe(), "a.jsonl")


def test_data_that_changed_since_the_interruption_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module._Writer, "close", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe())
    Path("a.jsonl").write_text(Path("b.jsonl").read_text())
    with pytest.raises(UnmaskError, match=r"a.jsonl: has changed since the preparation in out began"):
        prepared(recipe())


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_named_as_on_the_fly(tokenizer: PreTrainedTokenizerBase, workers: int) -> None:
    plan = recipe(dataset_name="bad.jsonl")
    with pytest.raises(UnmaskError) as expected:
        load_data(plan, tokenizer)
    with pytest.raises(UnmaskError) as caught:
        prepared(plan, workers=workers)
    assert str(caught.value) == str(expected.value) and "bad.jsonl line 6" in str(caught.value)
    with pytest.raises(UnmaskError, match=r"none: no record can be used: 30 dropped: response would vanish"):
        prepared(recipe(block_size=4), "none")


def test_mixtures_streams_and_prepared_data_are_not_prepared() -> None:
    with pytest.raises(UnmaskError, match=r"data.sources: a mixture is not prepared as a whole"):
        prepared(recipe(dataset_name=None, sources=[{"dataset_name": "a.jsonl"}]))
    with pytest.raises(UnmaskError, match=r"data.streaming has no effect on a preparation"):
        prepared(recipe(streaming=True))
    prepared(recipe())
    with pytest.raises(UnmaskError, match=r"data.dataset_name: out is prepared data already"):
        prepared(recipe(dataset_name="out"), "again")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_size": 32}, "(data.block_size: prepared 64, now 32)"),
        ({"max_records": 5}, "(data.max_records: prepared null, now 5)"),
        (
            {"sft": {"end_fill": 4, "train_on": "last"}},
            '(data.sft.train_on: prepared "all", now "last"; data.sft.end_fill: prepared 1, now 4)',
        ),
        ({"sft": {"layout": "separator"}}, '(data.sft.layout: prepared "auto", now "separator")'),
        ({"on_bad_record": "skip"}, '(data.on_bad_record: prepared "stop", now "skip")'),
        ({"dataset_name": ["out", "b.jsonl"]}, "out is prepared data, which stands alone"),
        ({"streaming": True}, "data.streaming: out is prepared data, which is read row by row anyway"),
    ],
)
def test_a_recipe_that_would_encode_otherwise_is_refused(
    change: dict[str, Any], says: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared(recipe())
    with pytest.raises(UnmaskError) as caught:
        load_data(recipe(**{"dataset_name": "out", **change}), tokenizer)
    assert says in str(caught.value)
    assert len(load_data(recipe(dataset_name="out", num_workers=1, packing=True), tokenizer).train) == 29


def test_another_mode_template_or_tokenizer_is_refused() -> None:
    prepared(recipe())
    with pytest.raises(UnmaskError, match=r'training_mode: prepared "sft", now "pretrain"'):
        load_data(recipe("pretrain", dataset_name="out"), byte_tokenizer())
    other = byte_tokenizer()
    other.chat_template = str(other.chat_template).replace("<|im_end|>\\n", "<|im_end|>")
    with pytest.raises(UnmaskError, match=r"chat_template: prepared .*sha256 .*, now .*sha256 "):
        load_data(recipe(dataset_name="out"), other)
    grown = byte_tokenizer()
    grown.add_tokens(["new"])
    with pytest.raises(UnmaskError, match=r"out: the tokenizer has changed since it was prepared"):
        load_data(recipe(dataset_name="out"), grown)


def test_a_fingerprint_is_of_the_vocabulary_alone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    before = fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "saved")
    assert fingerprint(unmask.load_tokenizer(str(tmp_path / "saved"))) == before
    tokenizer.add_tokens(["new"])
    assert fingerprint(tokenizer) != before


def test_missing_and_damaged_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(prepared(recipe()))
    shard = Path("out/shard-00001.parquet")
    damage(shard)
    with pytest.raises(
        UnmaskError, match=r"out/shard-00001.parquet: this shard .* is damaged; prepare again"
    ):
        open_prepared("out")
    monkeypatch.setattr(manifest, "VERIFIED", 0)  # a set too large to read whole at the start of a run
    rows = open_prepared("out")
    with pytest.raises(UnmaskError, match=r"out/shard-00001.parquet: this shard .* is damaged"):
        list(rows)
    shard.write_bytes(whole["shard-00001.parquet"][:-1])
    with pytest.raises(UnmaskError, match=r"out/shard-00001.parquet: this shard .* is damaged"):
        open_prepared("out")
    shard.unlink()
    with pytest.raises(
        UnmaskError, match=r"out/shard-00001.parquet: this shard .* is missing; prepare again"
    ):
        open_prepared("out")
    shard.write_bytes(whole["shard-00001.parquet"])
    for text in ("{", "[]", '{"kind": 1}', whole["manifest.json"].decode().replace('"rows": 7', '"rows": 8')):
        Path("out/manifest.json").write_text(text)
        with pytest.raises(
            UnmaskError, match=r"out/manifest.json: no manifest of prepared data, or a damaged"
        ):
            open_prepared("out")
    text = whole["manifest.json"].decode().replace('"version": 2', '"version": 99')
    Path("out/manifest.json").write_text(text)
    with pytest.raises(UnmaskError, match=r"version 99, but this is for version 2; prepare again"):
        open_prepared("out")


def test_rows_are_read_when_they_are_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = list(load_data(recipe(), tokenizer).train)
    prepared(recipe())
    rows = open_prepared("out")
    assert isinstance(rows[3:], PreparedExamples) and list(rows[3:-2]) == expected[3:-2]
    assert [rows[i] for i in (28, 0, -1, 5)] == [expected[i] for i in (28, 0, -1, 5)]
    assert list(rows[::-1]) == expected[::-1]
    assert rows[2:9].lengths() == [len(example.input_ids) for example in expected[2:9]]
    for some in (slice(2, 9), slice(0, 0), slice(None), slice(1, None, 3)):
        tokens = sum(len(example.input_ids) for example in expected[some])
        assert rows[some].totals() == (tokens, sum(example.supervised for example in expected[some]))
    other = rows.as_source(3)[1]
    assert (other.source, other.sample_id) == (3, 3 << 40 | expected[1].sample_id)
    with pytest.raises(IndexError):
        rows[29]


def test_a_row_group_more_than_a_shard_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"prompt": f"{n}", "completion": "x" * (n % 7 + 1)}) + "\n" for n in range(700)]
    Path("many.jsonl").write_text("".join(lines))
    plan = recipe(dataset_name="many.jsonl")
    expected = load_data(plan, byte_tokenizer()).train
    assert contents(prepared(plan, "two", workers=2, shard_records=300)) == contents(
        prepared(plan, shard_records=300)
    )
    assert list(open_prepared("out")) == list(expected)


def test_a_checkpoint_of_prepared_data_is_that_of_the_data_itself() -> None:
    tree: dict[str, Any] = {
        "training_mode": "sft",
        "seed": 5,
        "model": {"config": {**TINY}, "tokenizer": "bytes"},
        "data": {"dataset_name": "a.jsonl", "block_size": 64, "eval_size": 4, "sft": {"layout": "separator"}},
        "global_batch_size": 4,
        "max_steps": 3,
        "precision": "fp32",
        "report_to": [],
        "checkpoint_save_dir": "fly",
    }
    plan = recipe_from_dict(tree)
    one = unmask.train(plan, QUIET)
    prepared(plan)
    tree["data"]["dataset_name"] = "out"
    two = unmask.train(recipe_from_dict({**tree, "checkpoint_save_dir": "prepared"}), QUIET)
    assert two.held_out_loss == one.held_out_loss
    names = {"README.md", "recipe.yaml", "provenance.json"}  # which name the data
    before, after = contents("fly/final"), contents("prepared/final")
    assert {n: b for n, b in after.items() if n not in names} == {
        n: b for n, b in before.items() if n not in names
    }
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        after
    )


TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def test_the_command_shows_prepared_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.yaml").write_text(recipe().to_yaml())
    for arguments in (["prepare", "recipe.yaml", "out"], ["data", "recipe.yaml", "data.dataset_name=out"]):
        monkeypatch.setattr("sys.argv", ["unmask", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert (
        "1 dropped: response would vanish: the prompt alone fills block_size (first: a.jsonl line 5)" in shown
    )
    assert "example 1 of 29" in shown


def test_reports_add_up() -> None:
    one, two = EncodeReport(records=2, formats={"alpaca": 2}), EncodeReport(records=1, formats={"alpaca": 1})
    one.drop("why", "line 1")
    two.drop("why", "line 3")
    two.drop("else", "line 4")
    one.merge(two)
    assert EncodeReport.from_json(json.loads(json.dumps(asdict(one)))) == one
    assert (one.records, one.formats) == (3, {"alpaca": 3})
    assert one.dropped == {"why": (2, "line 1"), "else": (1, "line 4")}
    assert module.Part.of([]).table().num_rows == 0 == len(module.Part.of([Example([], [])]).input_ids)
