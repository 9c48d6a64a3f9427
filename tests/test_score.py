"""`unmask score`: a file in, figures and lines out, the same as `likelihood` gives for its records."""

from __future__ import annotations

import io
import json
import math
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tiny import byte_model, random_ids, run_cli, tiny_model
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.data.tokenizer import byte_tokenizer
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
from unmask.model.checkpoint import load_model

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
    before: Any = tokenizer(OPENED.format(prompt))["input_ids"]
    answer = [*response.encode(), 258]
    return Example([*before, *answer, 10], [True] * len(before) + [False] * len(answer) + [True])


def test_responses_are_scored_given_their_prompts(
    folder: Path, scored: FileScore, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = [example_of(record["instruction"], record["output"], tokenizer) for record in RECORDS]
    model = load_model(str(folder / "model"))
    expected = likelihood(model, collate(examples, pad_token_id=0), num_samples=4)
    assert [item.example.input_ids for item in scored.texts.items] == [one.input_ids for one in examples]
    assert [item.example.src_mask for item in scored.texts.items] == [one.src_mask for one in examples]
    for row, line in enumerate(scored.lines):
        assert line["nats"] == pytest.approx(expected.nll[row].item(), rel=1e-6)
        assert line["stderr"] == pytest.approx(expected.stderr[row].item(), rel=1e-6)
        assert sum(nats for _, nats in line["token_nats"]) == pytest.approx(line["nats"])
        assert (line["index"], line["record"]) == (row, f"chat.jsonl line {row + 1}")
        assert (line["tokens"], line["bytes"]) == ((4, 3), (2, 1), (4, 3))[row] and "mixture_nats" not in line
    assert [text for text, _ in scored.lines[0]["token_nats"]] == ["·", "é", "!", "⏹"]
    # The second record has two tokens, so its three sets of masked tokens are enumerated.
    assert scored.num_forwards == expected.num_forwards == 4 + 3 + 4 and scored.lines[1]["stderr"] == 0
    # Records 1 and 3 are equal, and so are their errors: they add up.
    assert scored.total.nll.item() == pytest.approx(expected.nll.sum().item())
    assert scored.total.stderr.item() == pytest.approx(2 * scored.lines[0]["stderr"])


@pytest.mark.parametrize("estimator", ["exact_k", "chain"])
@pytest.mark.parametrize("blocks", [{}, {"attention": "block_causal", "block_length": 3}], ids=str)
def test_in_bfloat16_a_record_has_the_same_bound_alone_and_in_a_batch(
    blocks: dict[str, Any], estimator: str
) -> None:
    """To the bit: padding among the keys would change sums of attention."""
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "max_position_embeddings": 128}
    model = tiny_model(dtype=torch.bfloat16, logit_shift=True, **sizes, **blocks).eval()
    examples = []
    for length in (20, 3, 12, 9):
        ids = random_ids(length, seed=length).tolist()
        examples.append(Example(ids, [index % 5 == 0 for index in range(length)]))
    settings: dict[str, Any] = {"num_samples": 4, "estimator": estimator}
    whole = likelihood(model, collate(examples, pad_token_id=0), batch_size=16, **settings)
    for row, example in enumerate(examples):
        alone = likelihood(model, collate([example], pad_token_id=0), batch_size=1, **settings)
        assert whole.nll[row] == alone.nll[0] and whole.stderr[row] == alone.stderr[0]
        assert torch.equal(whole.token_nll[row, : len(example.input_ids)], alone.token_nll[0])


def test_the_last_response_alone_is_scored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "dd"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}]))
    for end_fill, text in ((1, "dd<|im_end|>"), (8, "dd" + "<|im_end|>" * 6)):
        [item] = read_texts(tmp_path / "a.json", tokenizer, end_fill=end_fill).items
        is_scored = [not source for source in item.example.src_mask]
        assert tokenizer.decode(list(compress(item.example.input_ids, is_scored))) == text
        assert item.num_bytes == 2


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
    out = io.StringIO()
    show_total(score_file(str(folder / "model"), file, block_size=60, **FEW), Console(file=out, width=200))
    for shown in (out.getvalue(), texts.notes[0]):
        assert "not scored: 1 longer than block_size (first: long.jsonl line 2, 120 tokens)" in shown
    with pytest.raises(UnmaskError, match=r"2 .*first: long.jsonl line 1"):
        read_texts(file, tokenizer, block_size=20)


# Plain text.


@pytest.mark.parametrize("size", [5, 7, 100])
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
    if size == 7:
        assert texts.items[1].location == "text.txt, tokens 8 to 14"
    for positions, default in ((9, 9), (9999, 1024)):
        [note] = read_texts(folder / "text.txt", tokenizer, positions=positions).notes
        assert f"blocks of at most {default:,} tokens" in note


def test_each_block_is_scored_on_its_own(folder: Path, tmp_path: Path) -> None:
    whole = score_file(str(folder / "model"), folder / "text.txt", block_size=5, limit=2, **FEW)
    (tmp_path / "second.txt").write_text(", or ")
    alone = score_file(str(folder / "model"), tmp_path / "second.txt", **FEW)
    assert [line["nats"] for line in whole.lines[1:]] == [pytest.approx(alone.lines[0]["nats"], rel=1e-5)]


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
    assert read_texts(both, tokenizer).unit == "records"
    assert read_texts(both, tokenizer, raw=True).items[0].num_bytes == 3
    # A special token's string in a text is text.
    (tmp_path / "special.txt").write_text("<|im_end|>")
    [item] = read_texts(tmp_path / "special.txt", tokenizer).items
    assert item.example.input_ids == list(b"<|im_end|>") and item.num_bytes == 10


# What it writes and shows.


def test_lines_of_the_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    out.write_text("old")
    run: dict[str, Any] = {"estimator": "chain", "out": out}
    found = score_file(str(folder / "model"), folder / "chat.jsonl", per_token=True, **run)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == found.lines
    for line in lines:
        assert line["perplexity"] == pytest.approx(math.exp(line["nats"] / line["tokens"]))
        assert line["bits_per_byte"] == pytest.approx(line["nats"] / line["bytes"] / math.log(2))
        assert line["mixture_nats"] <= line["nats"]
    score_file(str(folder / "model"), folder / "chat.jsonl", **run)
    plain = [{name: line[name] for name in line if name != "token_nats"} for line in lines]
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == plain


def test_nats_stand_below_their_tokens(scored: FileScore) -> None:
    stream = io.StringIO()
    show_records(scored, 9, Console(file=stream, width=40))
    lines = stream.getvalue().splitlines()
    at = lines.index("·é!⏹")
    nats = [nats for _, nats in scored.lines[0]["token_nats"]]
    assert lines[at + 1] == "".join(str(int(one)) if one < 10 else "+" for one in nats)
    assert "Say" in lines[at - 1]  # the prompt
    drawn = list(coloured_tokens([["日本", 0.2], ["ab", 2.5], ["c", 12.0], ["d", 9.6]], width=6))
    assert [line.plain for line in drawn] == ["日本ab", "0   2 ", "cd", "+9"]
    assert [cell_len(line.plain) for line in drawn] == [6, 6, 2, 2]
    assert [span.style for span in drawn[0].spans] == ["green", "yellow"]


def test_command(folder: Path, scored: FileScore, tmp_path: Path) -> None:
    out, model = tmp_path / "scores.jsonl", folder / "model"
    arguments = ["score", model, folder / "chat.jsonl", "--samples", "4", "--show", "1", "--out", out]
    said = run_cli(*arguments)
    assert (said.code, said.err) == (0, "")
    assert "chat.jsonl line 1: 4 tokens" in said.out and "·é!⏹" in said.out
    assert "chat.jsonl line 2" not in said.out and len(out.read_text().splitlines()) == 3
    rows = {line.split("  ")[0]: line.split() for line in said.out.splitlines()}
    per_token, perplexity = scored.total.nats_per_token(), scored.total.perplexity()
    assert rows["nats per token"][-3:] == [f"{per_token.value:.4f}", "±", f"{per_token.stderr:.4f}"]
    assert rows["perplexity"][-3:] == [f"{perplexity.value:.4f}", "±", f"{perplexity.stderr:.4f}"]
    assert float(rows["bits per byte"][-3]) == pytest.approx(
        scored.total.nll.item() / 7 / math.log(2), abs=1e-4
    )
    assert rows["forward passes"][-1] == "11" and rows["records"][-1] == "3" and rows["bytes"][-1] == "7"
    assert run_cli(*arguments, "--seed", "1").out != said.out
    text = run_cli("score", model, folder / "text.txt", "--samples", "2", "--block-size", "8")
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
        ("text.jsonl", {"format": "alpaca"}, "no field 'instruction'"),
        ("chat.jsonl", {"format": "alpacca"}, "'alpacca'"),
        ("chat.jsonl", {"per_token": True}, "per_token"),
        ("chat.jsonl", {"block_size": 300}, "block_size: 300 tokens"),
        ("chat.jsonl", {"out": Path("no/such/scores.jsonl")}, "out: .*no/such"),
        ("chat.jsonl", {"out": Path(".")}, "out: . is a folder"),
    ],
)
def test_what_cannot_be_scored_is_said_before_the_work(
    folder: Path, tmp_path: Path, file: str, settings: dict[str, Any], message: str
) -> None:
    """There are no weights in the folder, so none were asked for."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    with pytest.raises(UnmaskError, match=message):
        score_file(str(tmp_path), folder / file, **settings)


def test_a_tokenizer_without_a_chat_template_scores_plain_text_alone(folder: Path) -> None:
    other = byte_tokenizer()
    other.chat_template = None
    assert read_texts(folder / "text.txt", other).items
    with pytest.raises(UnmaskError, match=r"no chat template .*score plain text \(--raw\)"):
        read_texts(folder / "chat.jsonl", other)
