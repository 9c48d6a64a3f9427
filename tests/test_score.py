"""`unmask score`: a file in, figures and lines out, the same as `likelihood` gives for its records."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from tiny import byte_model, run_cli
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.diffusion.likelihood import likelihood
from unmask.errors import UnmaskError
from unmask.evaluation import score as module
from unmask.evaluation.score import (
    FileScore,
    coloured_tokens,
    read_texts,
    score_file,
    show_records,
    show_total,
)

RECORDS = [
    {"instruction": "Say é", "output": "é!"},
    {"instruction": "Say b", "output": "b"},
    {"instruction": "Say é", "output": "é!"},
]
OPENED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
FEW: dict[str, Any] = {"num_samples": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("score")
    byte_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "text.txt").write_text("To be, or nöt to be: 日本語.", encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "To be"}\n{"text": " "}\n{"text": "or not"}\n')
    (folder / "empty.jsonl").write_text('{"text": " "}\n')
    return folder


@pytest.fixture(scope="module")
def scored(folder: Path) -> FileScore:
    return score_file(str(folder / "model"), folder / "chat.jsonl", num_samples=4)


def example_of(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A ChatML conversation of one turn, by hand."""
    ends = [tokenizer.eos_token_id]
    before: Any = tokenizer(OPENED.format(prompt))["input_ids"]
    answer: Any = [*tokenizer(response)["input_ids"], *ends]  # pyright: ignore
    after: Any = tokenizer("\n")["input_ids"]
    src = [True] * len(before) + [False] * len(answer) + [True] * len(after)
    return Example([*before, *answer, *after], src)


def test_responses_are_scored_given_their_prompts(
    folder: Path, scored: FileScore, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = [example_of(record["instruction"], record["output"], tokenizer) for record in RECORDS]
    model = module.load_model(str(folder / "model"))
    expected = likelihood(model, collate(examples, pad_token_id=0), num_samples=4)
    for row, record in enumerate(scored.records):
        assert record.text.example.input_ids == examples[row].input_ids
        assert record.text.example.src_mask == examples[row].src_mask
        torch.testing.assert_close(record.score.nll, expected.nll[row])
        torch.testing.assert_close(record.score.stderr, expected.stderr[row])
        assert record.score.num_tokens == (4, 2, 4)[row]
        assert record.mixture_nll is None
        ids, nats = record.scored()
        assert ids[-1] == tokenizer.eos_token_id and sum(nats) == pytest.approx(record.score.nll.item())
    assert [record.text.location for record in scored.records] == [f"chat.jsonl line {n}" for n in (1, 2, 3)]
    assert [record.text.num_bytes for record in scored.records] == [3, 1, 3] and scored.num_bytes == 7
    # The second record has two tokens, so its three sets of masked tokens are enumerated.
    assert scored.num_forwards == expected.num_forwards == 4 + 3 + 4
    assert scored.records[1].score.stderr == 0
    # Records 1 and 3 are equal, and so are their errors: they add up.
    total = scored.total
    assert total.nll.item() == pytest.approx(expected.nll.sum().item())
    assert total.stderr.item() == pytest.approx(2 * scored.records[0].score.stderr.item())
    assert scored.bits_per_byte().value.item() == pytest.approx(total.nll.item() / 7 / math.log(2))


def test_the_last_response_alone_is_scored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "dd"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}]))
    [item] = read_texts(tmp_path / "a.json", tokenizer).items
    places = [i for i, source in enumerate(item.example.src_mask) if not source]
    assert tokenizer.decode([item.example.input_ids[i] for i in places]) == "dd<|im_end|>"
    assert item.num_bytes == 2
    [filled] = read_texts(tmp_path / "a.json", tokenizer, end_fill=8).items
    assert filled.example.supervised == 8 and filled.num_bytes == 2


def test_groups_of_records_change_nothing(
    folder: Path, scored: FileScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORDS_AT_ONCE", 2)
    again = score_file(str(folder / "model"), folder / "chat.jsonl", num_samples=4, batch_size=3)
    # The model is float32, whose products of few rows round otherwise than those of many (a relative 1e-6 was
    # seen with AVX2 kernels); records that were mixed up would differ by more than a percent.
    torch.testing.assert_close(again.total.nll, scored.total.nll, rtol=1e-5, atol=0)
    torch.testing.assert_close(again.total.stderr, scored.total.stderr, rtol=1e-5, atol=0)
    assert again.num_forwards == scored.num_forwards


def test_records_too_long_are_left_out_and_named(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"instruction": "a" * n, "output": "b"}) + "\n" for n in (1, 99)))
    texts = read_texts(file, tokenizer, block_size=60)
    assert [item.location for item in texts.items] == ["long.jsonl line 1"]
    assert texts.dropped == {"longer than block_size": (1, "long.jsonl line 2")}
    out = io.StringIO()
    show_total(score_file(str(folder / "model"), file, block_size=60, **FEW), Console(file=out, width=200))
    assert "not scored: 1 " in out.getvalue() and "long.jsonl line 2" in out.getvalue()
    with pytest.raises(UnmaskError, match=r"2 .*first: long.jsonl line 1"):
        read_texts(file, tokenizer, block_size=20)


# Plain text.


@pytest.mark.parametrize("size", [5, 7, 26, 100])
def test_a_text_is_cut_into_blocks(folder: Path, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    text = (folder / "text.txt").read_text(encoding="utf-8")
    ids = list(text.encode())
    texts = read_texts(folder / "text.txt", tokenizer, block_size=size)
    assert [item.example.input_ids for item in texts.items] == [
        ids[i : i + size] for i in range(0, len(ids), size)
    ]
    assert not any(any(item.example.src_mask) for item in texts.items)
    # Also where a character is cut in two: no byte is lost or counted twice.
    assert sum(item.num_bytes for item in texts.items) == len(ids)
    assert all(abs(item.num_bytes - len(item.example.input_ids)) <= 2 for item in texts.items)
    assert (texts.kind, texts.block_size) == ("plain text", size)
    if size == 7:
        assert texts.items[1].location == "text.txt, tokens 8 to 14"
    for positions, default in ((9, 9), (9999, 1024)):
        assert read_texts(folder / "text.txt", tokenizer, positions=positions).block_size == default


def test_each_block_is_scored_on_its_own(folder: Path, tmp_path: Path) -> None:
    whole = score_file(str(folder / "model"), folder / "text.txt", block_size=5, limit=2, **FEW)
    assert len(whole.records) == 2
    (tmp_path / "second.txt").write_text(", or ")
    alone = score_file(str(folder / "model"), tmp_path / "second.txt", **FEW)
    torch.testing.assert_close(whole.records[1].score.nll, alone.records[0].score.nll)


def test_what_is_plain_text(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for raw in (False, True):
        items = read_texts(folder / "text.jsonl", tokenizer, raw=raw).items
        assert [(item.location, item.num_bytes) for item in items] == [
            ("text.jsonl line 1", 5),
            ("text.jsonl line 3", 6),
        ]
    code = tmp_path / "code.py"
    code.write_text("print(1)")
    assert read_texts(code, tokenizer).items[0].num_bytes == 8
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({**RECORDS[0], "text": "abc"}) + "\n")
    assert read_texts(both, tokenizer).kind == "conversations"
    assert read_texts(both, tokenizer, raw=True).items[0].num_bytes == 3
    # A special token's string in a text is text.
    (tmp_path / "special.txt").write_text("<|im_end|>")
    [item] = read_texts(tmp_path / "special.txt", tokenizer).items
    assert item.example.input_ids == list(b"<|im_end|>") and item.num_bytes == 10


# What it writes and shows.


@pytest.mark.parametrize("estimator", ["exact_k", "chain"])
def test_lines_of_the_output(
    folder: Path, tmp_path: Path, estimator: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    out = tmp_path / "scores.jsonl"
    out.write_text("old")
    found = score_file(
        str(folder / "model"), folder / "chat.jsonl", estimator=estimator, out=out, per_token=True
    )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and not list(tmp_path.glob(".*"))
    for line, record in zip(lines, found.records, strict=True):
        assert line["nats"] == record.score.nll.item() and line["stderr"] == record.score.stderr.item()
        assert (line["record"], line["bytes"]) == (record.text.location, record.text.num_bytes)
        assert line["perplexity"] == pytest.approx(math.exp(line["nats"] / line["tokens"]))
        assert line["bits_per_byte"] == pytest.approx(line["nats"] / line["bytes"] / math.log(2))
        assert sum(nats for _, nats in line["token_nats"]) == pytest.approx(line["nats"])
        assert line.get("mixture_nats") == record.mixture_nll
        assert (record.mixture_nll is not None) == (estimator == "chain")
    assert [text for text, _ in lines[0]["token_nats"]] == ["·", "é", "!", "⏹"]
    score_file(str(folder / "model"), folder / "chat.jsonl", out=out, **FEW)
    assert "token_nats" not in json.loads(out.read_text().splitlines()[0])


def test_a_text_without_bytes_has_no_bits_per_byte(scored: FileScore) -> None:
    record = scored.records[0]
    empty = module.ScoredText(record.text.example, "x", 0)
    line = module.RecordScore(empty, record.score, record.token_nll, None).as_json(0)
    assert line["bits_per_byte"] is None and line["nats"] > 0


def test_a_run_that_is_killed_leaves_no_half_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.jsonl"
    out.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(module, "likelihood", lambda *args, **settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score_file(str(folder / "model"), folder / "chat.jsonl", out=out)
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def rendered(scored: FileScore, colour: bool = False, width: int = 40) -> list[str]:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    show_records(scored, 9, console)
    return stream.getvalue().splitlines()


def test_nats_stand_below_their_tokens(scored: FileScore) -> None:
    lines = rendered(scored)
    record = scored.records[0]
    assert lines[0].startswith("chat.jsonl line 1: 4 tokens, ") and "±" in lines[0] + lines[1]
    at = lines.index("·é!⏹")
    _, nats = record.scored()
    assert lines[at + 1] == "".join(str(int(n)) if n < 10 else "+" for n in nats)
    assert "Say" in lines[at - 1]  # the prompt
    assert "rounded down" in " ".join(lines[-2:])


def test_colours_and_wrapping() -> None:
    texts, nll = ["日本", "ab", "c", "d"], [0.2, 2.5, 12.0, 9.6]
    lines = list(coloured_tokens(texts, nll, width=6))
    assert [line.plain for line in lines] == ["日本ab", "0   2 ", "cd", "+9"]
    assert [cell_len(line.plain) for line in lines] == [6, 6, 2, 2]
    assert [span.style for span in lines[0].spans] == ["green", "yellow"]
    assert [span.style for span in lines[2].spans] == ["bold white on red"] * 2


def test_colour_changes_no_character(scored: FileScore) -> None:
    coloured = rendered(scored, colour=True)
    assert any("\x1b[" in line for line in coloured)
    assert [Text.from_ansi(line).plain for line in coloured] == rendered(scored)


def test_totals_are_shown_with_their_errors(scored: FileScore) -> None:
    stream = io.StringIO()
    show_total(scored, Console(file=stream, width=80))
    rows = {line.split("  ")[0]: line.split() for line in stream.getvalue().splitlines()}
    per_token, perplexity = scored.total.nats_per_token(), scored.total.perplexity()
    assert rows["nats per token"][-3:] == [f"{per_token.value:.4f}", "±", f"{per_token.stderr:.4f}"]
    assert rows["perplexity"][-3:] == [f"{perplexity.value:.4f}", "±", f"{perplexity.stderr:.4f}"]
    assert rows["bits per byte"][-3] == f"{scored.bits_per_byte().value:.4f}"
    assert rows["forward passes"][-1] == "11" and rows["records"][-1] == "3" and rows["bytes"][-1] == "7"


def test_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    arguments = [
        "score",
        folder / "model",
        folder / "chat.jsonl",
        "--samples",
        "4",
        "--show",
        "1",
        "--out",
        out,
    ]
    said = run_cli(*arguments)
    assert (said.code, said.err) == (0, "")
    for words in ("chat.jsonl line 1: 4 tokens", "·é!⏹", "nats per token", "perplexity", "forward passes"):
        assert words in said.out
    assert "chat.jsonl line 2" not in said.out and len(out.read_text().splitlines()) == 3
    assert run_cli(*arguments).out == said.out
    assert run_cli(*arguments, "--seed", "1").out != said.out
    text = run_cli("score", folder / "model", folder / "text.txt", "--samples", "2", "--block-size", "8")
    assert text.code == 0 and "in blocks of at most 8 tokens, each scored independently" in text.out


# Bad input.


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("chat.jsonl", {"estimator": "exact"}, "estimator"),
        ("chat.jsonl", {"num_samples": 5}, "num_samples"),
        ("missing.jsonl", {}, "missing.jsonl"),
        ("empty.jsonl", {}, "no text"),
        ("text.txt", {"format": "alpaca"}, "format has no effect"),
        ("text.jsonl", {"raw": True, "end_fill": 4}, "end_fill has no effect"),
        ("chat.jsonl", {"raw": True}, "line 1: .*'text'; .*instruction"),
        ("text.jsonl", {"format": "alpaca"}, "alpaca"),
        ("chat.jsonl", {"format": "alpacca"}, "'alpacca'"),
        ("chat.jsonl", {"per_token": True}, "per_token"),
        ("chat.jsonl", {"block_size": 300}, "block_size: 300 tokens"),
        ("chat.jsonl", {"out": Path("no/such/scores.jsonl")}, "out: .*no/such"),
        ("chat.jsonl", {"out": Path(".")}, "out: . is a folder"),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_work(
    folder: Path, file: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda name: pytest.fail("the work has begun"))
    with pytest.raises(UnmaskError, match=message):
        score_file(str(folder / "model"), folder / file, **settings)


def test_a_tokenizer_without_a_chat_template_scores_plain_text_alone(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = module.load_tokenizer("bytes")
    other.chat_template = None
    assert read_texts(folder / "text.txt", other).items
    with pytest.raises(UnmaskError, match=r"no chat template .*score plain text \(--raw\)"):
        read_texts(folder / "chat.jsonl", other)
