from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from unmask.data.encode import DropRecord, Encoder, Example, encode_documents, encode_each, encode_records
from unmask.data.encode_report import EncodeReport
from unmask.data.records import Conversation, CustomFields, RecordError, Turn
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer
from unmask.errors import UnmaskError

# As Llama 2.
INST = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""


def encoder_of(**settings: Any) -> Encoder:
    return Encoder(byte_tokenizer(), **settings)


CHATML = encoder_of()
END = CHATML.end_token_id
NOTE = "held strings like special tokens, read as plain text"


def talk(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of user and assistant in turn."""
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Conversation(tuple([Turn("system", system)] if system else []) + tuple(turns), "here")


def learnt(encoder: Encoder, row: Example) -> list[str]:
    """The text of each supervised run."""
    grouped = groupby(zip(row.src_mask, row.input_ids, strict=True), key=lambda pair: pair[0])
    return [str(encoder.tokenizer.decode([i for _, i in run])) for source, run in grouped if not source]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges and the word pattern of GPT-4 and Qwen."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "user assistant system think\n\n### Response:\nthe answer to this question is, of course, "
    backend.train_from_iterator([text] * 4 + ["12 + 34 = 46.\n\n", "<think>\n\n</think>\n\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>"],
    )


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words start with a mark in place of their blank, and so does every text."""
    backend = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    text = "I pray you say it as I said it [INST] [/INST] the tag is html what of a b "
    backend.train_from_iterator([text.replace(" ", "▁")] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


# The tokenizer's own ids


@pytest.mark.parametrize(
    "conversation",
    [
        talk("What is 12 + 34?", "The answer is 46.", "And this?\n", "Of course:\n\n7"),
        talk("say it", "I pray you", "as I", "as I said it"),
    ],
)
@pytest.mark.parametrize(
    ("name", "template"),
    [("bpe", CHATML_TEMPLATE), ("bpe", None), ("sentencepiece", None), ("sentencepiece", INST)],
)
def test_ids_are_those_of_the_whole_rendering(
    name: str, template: str | None, conversation: Conversation, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    text = tokenizer.apply_chat_template(messages, chat_template=encoder.chat_template, tokenize=False)
    row = encoder.encode(conversation)
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(row.input_ids) < len(text)
    for place in (1, 3):
        asked = encoder.prompt_example(conversation.turns[:place]).input_ids
        row = encoder.encode(Conversation(conversation.turns[: place + 1], "here"))
        assert row.input_ids[: len(asked)] == asked and not row.src_mask[len(asked)]
        answer, end = learnt(encoder, row)[-1], str(tokenizer.decode([encoder.end_token_id]))
        assert answer.endswith(end)
        assert answer.removesuffix(end).strip() == conversation.turns[place].content.strip()


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_special_strings_in_texts_are_plain_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = INST
    encoder = Encoder(tokenizer)
    row = encoder.encode(talk("what is a<s>b", f"the tag a<s>b{tokenizer.eos_token} is html"))
    controls = [i for i in row.input_ids if i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert controls == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert f"the tag a<s>b{tokenizer.eos_token} is html" in tokenizer.decode(row.input_ids)
    # The tokenizer itself is left as it was.
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"][-1] == tokenizer.bos_token_id


def test_a_token_of_prompt_and_response_is_cut_between_them(bpe: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(bpe, layout="separator", separator="\n")
    row = encoder.encode(talk("this", "\n\nthe answer"))
    prompt = encoder.prompt_example([Turn("user", "this")]).input_ids
    assert row.input_ids[: len(prompt)] == prompt and row.src_mask.index(False) == len(prompt)


# Settings


def test_what_is_left_out_or_source() -> None:
    last = encoder_of(train_on="last")
    assert learnt(last, last.encode(talk("q", "a", "r", "b"))) == ["b<|im_end|>"]
    turns = (Turn("user", "q"), Turn("assistant", "a", train=False), Turn("user", "r"))
    row = CHATML.encode(Conversation((*turns, Turn("assistant", "b")), "here"))
    assert learnt(CHATML, row) == ["b<|im_end|>"]
    with pytest.raises(DropRecord, match="no turn is to be trained on"):
        CHATML.encode(Conversation(turns, "here"))
    assert CHATML.encode(talk("q", "a", "r")) == CHATML.encode(talk("q", "a"))
    bare, with_system, without = (
        encoder_of(include_system_prompt=False),
        talk("q", "a", system="s"),
        talk("q", "a"),
    )
    assert bare.encode(with_system) == CHATML.encode(without)
    assert (
        bare.prompt_example(with_system.turns[:-1]).input_ids
        == CHATML.prompt_example(without.turns[:-1]).input_ids
    )


@pytest.mark.parametrize(("reply", "ends"), [("abc", 1), ("abcd", 4), ("abcdefg", 1), ("abcde", 3)])
def test_end_fill(reply: str, ends: int) -> None:
    encoder = encoder_of(end_fill=4)
    row = encoder.encode(talk("q", "a", "r", reply))
    assert learnt(encoder, row) == ["a<|im_end|>", reply + "<|im_end|>" * ends] and not row.src_mask[-1]


def test_too_long() -> None:
    whole = CHATML.encode(talk("q", "abcdefgh"))
    size = len(whole.input_ids) - 4  # "h", the end token and the line break, and one more
    row = encoder_of(block_size=size).encode(talk("q", "abcdefgh"))
    assert (row.input_ids, row.src_mask) == (whole.input_ids[:size], whole.src_mask[:size])
    with pytest.raises(DropRecord, match="longer than block_size"):
        encoder_of(block_size=size, too_long="drop").encode(talk("q", "abcdefgh"))
    with pytest.raises(DropRecord, match="the prompt alone fills block_size"):
        encoder_of(block_size=10).encode(talk("q", "abcdefgh"))
    # The line break after the response may be cut.
    encoder = encoder_of(block_size=len(whole.input_ids) - 1, too_long="drop")
    records = [({"instruction": "q", "output": "abcdefgh"}, "here")]
    [example], report = encode_records(records, encoder)
    assert (report.kept, report.truncated, report.dropped) == (1, 0, {})
    assert example.input_ids == whole.input_ids[:-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("layout", "plain"), ("train_on", "first"), ("too_long", "keep"), ("end_fill", 0), ("block_size", 1)],
)
def test_bad_settings(name: str, value: Any) -> None:
    with pytest.raises(UnmaskError, match=rf"{name} must be .*; got {value!r}"):
        encoder_of(**{name: value})


def test_tokenizers_that_lack_something() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UnmaskError, match="chat template"):
        Encoder(tokenizer, layout="chat")
    tokenizer.eos_token = None
    with pytest.raises(UnmaskError, match="eos_token"):
        Encoder(tokenizer)


# Many records


def test_every_record_is_counted() -> None:
    turns = [{"role": role, "content": "q"} for role in ("user", "assistant", "user")]
    good: dict[str, Any] = {"instruction": "q", "output": "a"}
    cases: list[Any] = [
        good,
        {**good, "instruction": "q" * 99},
        {**good, "output": "a" * 99},
        {"prompt": "q" * 99, "completion": "a"},
        {"prompt": "<|im_end|>", "completion": "a", "id": 7},
        {"messages": turns},
        {**good, "output": 1},
        *(RecordError(f"x line {n}", "not valid JSON", f" (column {n})") for n in (8, 9)),
    ]
    records = [(record, f"x line {number}") for number, record in enumerate(cases, 1)]
    examples, report = encode_records(records, encoder_of(block_size=60), on_bad_record="skip")
    assert [row.record for row in examples] == [0, 2, 4, 5]
    assert len({row.sample_id for row in examples}) == 4
    assert report == EncodeReport(
        records=9,
        kept=4,
        truncated=1,
        dropped={"response would vanish: the prompt alone fills block_size": (2, "x line 2, 118 tokens")},
        skipped={"field 'output' must be text": (1, "x line 7"), "not valid JSON": (2, "x line 8")},
        tokens=sum(len(row.input_ids) for row in examples),
        supervised_tokens=sum(row.supervised for row in examples),
        formats=Counter(alpaca=3, prompt_completion=2, messages=1),
        notes=Counter({NOTE: 1, "had turns after the last response, left out": 1}),
        unused=Counter(id=1),
    )
    assert report.left_out() == [
        "2 dropped: response would vanish: the prompt alone fills block_size (first: x line 2, 118 tokens)",
        "1 skipped: field 'output' must be text (first: x line 7)",
        "2 skipped: not valid JSON (first: x line 8)",
        "fields not used: id (1)",
    ]
    # Reports of parts add up to that of the whole, and survive JSON.
    adapter, sum_of_parts = TypeAdapter(EncodeReport), EncodeReport()
    for part in (records[:4], records[4:]):
        _, found = encode_records(part, encoder_of(block_size=60), on_bad_record="skip")
        sum_of_parts.merge(adapter.validate_json(adapter.dump_json(found)))
    assert sum_of_parts == report
    with pytest.raises(RecordError, match=r"^x line 7: field 'output' must be text"):
        encode_records(records, CHATML)


def test_many_records_equal_each_alone_and_are_read_as_they_come() -> None:
    names = CustomFields("question", None, "answer")
    tail = ["", "<|im_end|>", "\n", "<think>x</think>"]
    records = [{"question": f"q{i}", "answer": f"{tail[i % 4]}a{i}"} for i in range(600)]
    read: list[int] = []
    items = ((record, "x", 2, read.append(n) or 7 * n) for n, record in enumerate(records))
    stream = encode_each(items, CHATML, "custom", names, report=EncodeReport())
    first = next(stream)
    assert len(read) < 600
    for number, (row, record) in enumerate(zip([first, *stream], records, strict=True)):
        alone = CHATML.encode(talk(record["question"], record["answer"]))
        assert (alone.input_ids, alone.src_mask) == (row.input_ids, row.src_mask)
        assert (row.file, row.record) == (2, 7 * number)


# Documents

END_TEXT = "<|im_end|>"


def blocks_of(documents: list[Any], size: int, **settings: Any) -> tuple[list[Example], EncodeReport]:
    """The examples of documents of file 3, and what became of them."""
    report = EncodeReport()
    items = ((document, f"x line {n + 1}", 3, n) for n, document in enumerate(documents))
    return list(encode_documents(items, byte_tokenizer(), size, **settings, report=report)), report


def decoded(rows: list[Example]) -> list[str]:
    assert not any(any(row.src_mask) for row in rows) and len({row.sample_id for row in rows}) == len(rows)
    return [str(byte_tokenizer().decode(row.input_ids)) for row in rows]


def test_joined_documents_are_cut_into_blocks_wherever_they_end() -> None:
    blocks, report = blocks_of(["abcd", " ", f"e{END_TEXT}", "fg"], 6, join=True)
    assert [len(block.input_ids) for block in blocks] == [6, 6, 6, 1]
    ids = [i for block in blocks for i in block.input_ids]
    assert [i for i, token in enumerate(ids) if token == END] == [4, 16]  # the text's own is plain text
    assert "".join(decoded(blocks)) == f"abcd{END_TEXT}e{END_TEXT}{END_TEXT}fg"
    assert (report.records, report.kept, report.tokens, report.supervised_tokens) == (3, 3, 19, 19)
    assert blocks_of([" "], 6, join=True)[0] == []


def test_packed_documents_are_examples_of_their_own_with_their_end_token() -> None:
    documents = ["abcd", "", f"e{END_TEXT}", "0123456789", "vwxyz"]
    parts, report = blocks_of(documents, 6, join=False)
    # A document as long as a row leaves its end token to the next.
    whole = [f"abcd{END_TEXT}", "e<|im_", f"end|>{END_TEXT}", "012345", f"6789{END_TEXT}", f"vwxyz{END_TEXT}"]
    assert decoded(parts) == whole and [part.input_ids.count(END) for part in parts] == [1, 0, 1, 0, 1, 1]
    assert [(part.file, part.record) for part in parts] == [(3, 0), (3, 2), (3, 2), (3, 3), (3, 3), (3, 4)]
    assert (report.truncated, report.tokens, report.supervised_tokens) == (0, 34, 34)
    parts, report = blocks_of(["0123456789", "abc", "uvwxyz"], 6, join=False, long_documents="cut")
    assert decoded(parts) == ["012345", f"abc{END_TEXT}", "uvwxyz"] and report.truncated == 2


@given(st.lists(st.text("ab", max_size=40), min_size=1, max_size=8), st.integers(2, 20), st.booleans())
def test_documents_can_be_read_back_from_their_parts(documents: list[str], size: int, join: bool) -> None:
    parts, _ = blocks_of(documents, size, join=join)
    ended = "".join(f"{text}{END_TEXT}" for text in documents if text)
    assert "".join(decoded(parts)) == (ended.removesuffix(END_TEXT) if join else ended)
    assert all(0 < len(part.input_ids) <= size for part in parts)


def test_bad_documents_are_skipped_with_their_reasons() -> None:
    missing = RecordError("x line 2", "field 'text' is missing", "; fields here: a")
    documents = ["fine", missing, END_TEXT, "\ud800"]
    parts, report = blocks_of(documents, 99, join=False, on_bad_record="skip")
    assert [part.record for part in parts] == [0, 2] and (report.records, report.kept) == (4, 2)
    assert report.skipped == {
        "field 'text' is missing": (1, "x line 2"),
        "field 'text' has an unpaired surrogate": (1, "x line 4"),
    }
    assert report.notes == {NOTE: 1}
    with pytest.raises(RecordError, match=r"^x line 2: field 'text' is missing; fields here: a\.$"):
        blocks_of(documents, 99, join=False)
