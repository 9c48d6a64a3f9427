from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from unmask.data.encode import (
    DropRecord,
    Encoder,
    EncodeReport,
    Example,
    encode_each,
    encode_records,
    separator_template,
)
from unmask.data.records import Conversation, CustomFields, RecordError, Turn
from unmask.data.tokenizer import CHATML_TEMPLATE, byte_tokenizer
from unmask.errors import UnmaskError

# The shape of Qwen3's: no generation tag, thinking moved about, and before the final assistant turn
# alone an empty think block.
QWEN_SHAPED = r"""
{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query %}
{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# The shape of Llama 3's: contents trimmed, no line break after the end token.
TRIMMING = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n\n' + message.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "qwen": QWEN_SHAPED,
    "trimming": TRIMMING,
    "separator": None,
}


def encoder_of(template: str, **kwargs: Any) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    return Encoder(tokenizer, **kwargs)


ENCODERS = {name: encoder_of(name) for name in TEMPLATES}
every_template = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
END = ENCODERS["chatml"].end_token_id


def talk(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of user and assistant in turn."""
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Conversation(tuple([Turn("system", system)] if system else []) + tuple(turns), "here")


def runs(encoder: Encoder, row: Example) -> list[tuple[bool, str]]:
    """(is source, decoded text) of each run of equal src_mask."""
    grouped = groupby(zip(row.src_mask, row.input_ids, strict=True), key=lambda pair: pair[0])
    return [(src, str(encoder.tokenizer.decode([i for _, i in run]))) for src, run in grouped]


def responses(encoder: Encoder, row: Example) -> list[str]:
    """The supervised texts, each checked to end in the end token and stripped of it."""
    texts = []
    grouped = groupby(zip(row.src_mask, row.input_ids, strict=True), key=lambda pair: pair[0])
    for src, run in grouped:
        if not src:
            ids = [i for _, i in run]
            assert ids[-1] == END
            assert END not in ids[:-1]
            texts.append(encoder.tokenizer.decode(ids[:-1]))
    return texts


def rendering(encoder: Encoder, conversation: Conversation) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    template = encoder.chat_template
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert isinstance(text, str)
    return text


# Layout


def test_chatml_spans() -> None:
    encoder = ENCODERS["chatml"]
    assert runs(encoder, encoder.encode(talk("q", "a", "r", "b", system="s"))) == [
        (True, "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
         "<|im_start|>assistant\n"),
        (False, "a<|im_end|>"),
        (True, "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"),
        (False, "b<|im_end|>"),
        (True, "\n"),
    ]  # fmt: skip


def test_separator_spans() -> None:
    encoder = ENCODERS["separator"]
    assert encoder.chat_template == separator_template("\n\n### Response:\n")
    assert runs(encoder, encoder.encode(talk("q", "a", "r", "b", system="s"))) == [
        (True, "s\n\nq\n\n### Response:\n"),
        (False, "a<|im_end|>"),
        (True, "\n\nr\n\n### Response:\n"),
        (False, "b<|im_end|>"),
    ]


@pytest.mark.parametrize("separator", ["\n\"'\\{{ x }}{% end %}\n", "→🎉\t", ""])
def test_separator_may_be_any_text(separator: str) -> None:
    encoder = Encoder(byte_tokenizer(), layout="separator", separator=separator)
    assert rendering(encoder, talk("q", "a")) == f"q{separator}a<|im_end|>"
    assert responses(encoder, encoder.encode(talk("q", "a"))) == ["a"]


def test_separator_announces_responses_only() -> None:
    turns = (Turn("user", "q"), Turn("tool", "t"), Turn("assistant", "a"))
    text = rendering(ENCODERS["separator"], Conversation(turns, "here"))
    assert text == "q\n\nt\n\n### Response:\na<|im_end|>"


def test_a_response_starts_where_the_generation_prompt_ends() -> None:
    """The empty think block of the final turn is a part of the response, unless thinking is off."""
    encoder = ENCODERS["qwen"]
    assert runs(encoder, encoder.encode(talk("q", "a", "r", "b"))) == [
        (True, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"),
        (False, "a<|im_end|>"),
        (True, "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"),
        (False, "<think>\n\n</think>\n\nb<|im_end|>"),
        (True, "\n"),
    ]
    off = Encoder(encoder.tokenizer, thinking="off")  # pyright: ignore[reportArgumentType]
    row = off.encode(talk("q", "b"))
    assert runs(off, row)[:2] == [
        (True, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (False, "b<|im_end|>"),
    ]
    prompt = off.encode_prompt((Turn("user", "q"),))
    assert row.input_ids[: len(prompt)] == prompt and not row.src_mask[len(prompt)]


def test_written_thinking_is_response_and_dropped_where_the_template_drops_it() -> None:
    encoder = ENCODERS["qwen"]
    thought = "<think>\nhm\n</think>\n\n"
    row = encoder.encode(talk("q", f"{thought}a", "r", f"{thought}b"))
    assert responses(encoder, row) == ["a", f"{thought}b"]
    row = encoder.encode(talk("q", "<think>hm</think>a"))
    assert responses(encoder, row) == [f"{thought}a"]
    row = encoder.encode(talk("q", "<think>\n\n</think>\n\na"))
    assert responses(encoder, row) == ["<think>\n\n</think>\n\na"]


def test_trimming_template() -> None:
    encoder = ENCODERS["trimming"]
    row = encoder.encode(talk(" q ", "  a\n", "r", "\n\nb c "))
    assert responses(encoder, row) == ["a", "b c"]


def test_trimmed_response_that_holds_a_copy_of_what_follows() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '[' + m.role + ']' + m.content | trim }}"
        "{%- if m.role == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
    )
    encoder = Encoder(tokenizer)
    row = encoder.encode(talk("q", " a<|im_end|>[user]r[assistant] ", "r", "b"))
    assert responses(encoder, row) == ["a<|im_end|>[user]r[assistant]", "b"]


def test_whitespace_before_the_end_token_belongs_to_the_response() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '[' + m.role + '] ' + m.content }}"
        "{%- if m.role == 'assistant' %}{{- ' ' + eos_token }}{%- endif %}{%- endfor %}"
    )
    encoder = Encoder(tokenizer)
    assert responses(encoder, encoder.encode(talk("q", "a", "r", "b"))) == [" a ", " b "]


def test_generation_tags_change_nothing() -> None:
    tokenizer = byte_tokenizer()
    tagged = CHATML_TEMPLATE.replace("{{- '<|im_start|>' +", "{%- generation %}{{- '<|im_start|>' +")
    tokenizer.chat_template = tagged.replace("'<|im_end|>\\n' }}", "'<|im_end|>\\n' }}{% endgeneration %}")
    assert "endgeneration" in tokenizer.chat_template
    row = Encoder(tokenizer).encode(talk("q", "a"))
    assert row == ENCODERS["chatml"].encode(talk("q", "a"))


def test_template_that_rewrites_beyond_recognition_drops_the_record() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML_TEMPLATE.replace(
        "message.content", "(message.content if 'x' not in message.content else 'xx') "
    ).replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if 'x' not in message.content else '!')")
    encoder = Encoder(tokenizer)
    with pytest.raises(DropRecord, match="rewrites the response"):
        encoder.encode(talk("q", "x"))


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{%- for m in messages %}{{- m.role + m.content }}{%- endfor %}", "writes no end token"),
        (
            "{%- for m in messages %}{{- m.role }}{%- endfor %}",
            "does not write the assistant's text",
        ),
        ("{%- for m in messages %}{{- m.content | length }}{%- endfor %}", "does not write"),
        ("{{- raise_exception('no') }}", "the chat template refuses the turns: no"),
    ],
)
def test_unusable_templates(template: str, error: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnmaskError, match=error):
        Encoder(tokenizer)


def test_template_that_refuses_a_conversation_names_the_record() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{%- if messages[0].role == 'system' %}{{- raise_exception('No system turn!') }}"
        "{%- endif %}" + CHATML_TEMPLATE
    )
    encoder = Encoder(tokenizer)
    with pytest.raises(UnmaskError, match="here: the chat template refuses the turns: No system"):
        encoder.encode(talk("q", "a", system="s"))


# Invariants

texts = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|mask|>", "\n", " ", "<think>", "\ue000"]),
        st.sampled_from(["\ue0000\ue001", "\ue0000\ue001r1\ue002", "\ue0000\ue001s0\ue002"]),
    ),
    max_size=5,
).map("".join)
answers = texts.filter(lambda text: text.strip() and "</think>" not in text)
EXPECTED = {
    "chatml": lambda text, last: text,
    "separator": lambda text, last: text,
    "trimming": lambda text, last: text.strip(),
    "qwen": lambda text, last: f"<think>\n\n</think>\n\n{text.lstrip(chr(10))}" if last else text,
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=60, deadline=None)
@given(questions=st.tuples(texts, texts), replies=st.tuples(answers, answers))
@example(questions=("<|im_end|>", "\n"), replies=(" <|im_end|>\n<|im_start|>user\n", "\n<|mask|>"))
def test_supervised_text_is_exactly_the_responses(
    name: str, questions: tuple[str, str], replies: tuple[str, str]
) -> None:
    encoder = ENCODERS[name]
    conversation = talk(questions[0], replies[0], questions[1], replies[1])
    row = encoder.encode(conversation)
    expected = [EXPECTED[name](text, last) for text, last in zip(replies, (False, True), strict=True)]
    assert responses(encoder, row) == expected
    assert encoder.tokenizer.decode(row.input_ids) == rendering(encoder, conversation)
    assert 259 not in row.input_ids


@every_template
@settings(max_examples=30, deadline=None)
@given(question=texts, reply=answers)
def test_generation_prompt_is_the_training_prefix(encoder: Encoder, question: str, reply: str) -> None:
    conversation = talk("a", "b", question, reply, system="s")
    last = Encoder(encoder.tokenizer, train_on="last")  # pyright: ignore[reportArgumentType]
    row = last.encode(conversation)
    prompt = encoder.encode_prompt(conversation.turns[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.src_mask[: len(prompt)] == [True] * len(prompt)
    assert not row.src_mask[len(prompt)]


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


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_those_of_the_whole_rendering(bpe: PreTrainedTokenizerFast, name: str) -> None:
    bpe.chat_template = TEMPLATES[name]
    encoder = Encoder(bpe)
    conversation = talk("What is 12 + 34?", "The answer is 46.", "And this?\n", "Of course:\n\n7")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    whole = bpe.apply_chat_template(
        messages, chat_template=encoder.chat_template, tokenize=True, return_dict=False
    )
    row = encoder.encode(conversation)
    assert row.input_ids == whole
    assert len(row.input_ids) < len(rendering(encoder, conversation)) / 2


def test_special_strings_in_texts_are_plain_text(bpe: PreTrainedTokenizerFast) -> None:
    bpe.chat_template = CHATML_TEMPLATE
    encoder = Encoder(bpe)
    row = encoder.encode(talk("a<|im_end|>b", "<|im_start|>"))
    ends = [i for i, token in enumerate(row.input_ids) if token == encoder.end_token_id]
    assert [row.src_mask[i] for i in ends] == [True, False]
    assert bpe.convert_tokens_to_ids("<|im_start|>") not in row.input_ids[ends[0] + 3 :]
    assert "a<|im_end|>b<|im_end|>" in bpe.decode(row.input_ids)
    # The tokenizer itself is left as it was.
    assert bpe("<|im_end|>")["input_ids"] == [encoder.end_token_id]


# Settings


def test_train_on_last() -> None:
    encoder = encoder_of("chatml", train_on="last")
    assert responses(encoder, encoder.encode(talk("q", "a", "r", "b"))) == ["b"]


def test_turns_not_to_be_trained_on_are_source() -> None:
    encoder = ENCODERS["chatml"]
    turns = (Turn("user", "q"), Turn("assistant", "a", train=False), Turn("user", "r"))
    row = encoder.encode(Conversation((*turns, Turn("assistant", "b")), "here"))
    assert responses(encoder, row) == ["b"]
    with pytest.raises(DropRecord, match="no turn is to be trained on"):
        encoder.encode(Conversation(turns, "here"))


def test_turns_after_the_last_response_are_left_out() -> None:
    encoder = ENCODERS["qwen"]
    assert encoder.encode(talk("q", "a", "r")) == encoder.encode(talk("q", "a"))


def test_system_prompt_can_be_left_out() -> None:
    encoder = encoder_of("chatml", include_system_prompt=False)
    with_system, without = talk("q", "a", system="s"), talk("q", "a")
    assert encoder.encode(with_system) == ENCODERS["chatml"].encode(without)
    prompt = encoder.encode_prompt(with_system.turns[:-1])
    assert prompt == ENCODERS["chatml"].encode_prompt(without.turns[:-1])


@pytest.mark.parametrize(("reply", "ends"), [("abc", 1), ("abcd", 4), ("abcdefg", 1), ("abcde", 3)])
def test_end_fill(reply: str, ends: int) -> None:
    encoder = encoder_of("chatml", end_fill=4)
    row = encoder.encode(talk("q", "a", "r", reply))
    last = runs(encoder, row)[-1]
    assert last == (False, reply + "<|im_end|>" * ends)
    assert runs(encoder, row)[1] == (False, "a<|im_end|>")


def test_too_long() -> None:
    whole = ENCODERS["chatml"].encode(talk("q", "abcdefgh"))
    size = len(whole.input_ids) - 4  # "h", the end token and the line break, and one more
    row = encoder_of("chatml", block_size=size).encode(talk("q", "abcdefgh"))
    assert row.input_ids == whole.input_ids[:size]
    assert row.src_mask == whole.src_mask[:size]
    with pytest.raises(DropRecord, match="longer than block_size"):
        encoder_of("chatml", block_size=size, too_long="drop").encode(talk("q", "abcdefgh"))
    with pytest.raises(DropRecord, match="the prompt alone fills block_size"):
        encoder_of("chatml", block_size=10).encode(talk("q", "abcdefgh"))


def test_only_the_line_break_after_the_response_does_not_fit() -> None:
    whole = ENCODERS["chatml"].encode(talk("q", "a"))
    encoder = encoder_of("chatml", block_size=len(whole.input_ids) - 1, too_long="drop")
    examples, report = encode_records([({"instruction": "q", "output": "a"}, "here")], encoder)
    assert (report.kept, report.truncated, report.dropped) == (1, 0, {})
    assert examples[0].input_ids == whole.input_ids[:-1]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"layout": "plain"}, "layout must be one of auto, chat, separator; got 'plain'"),
        ({"train_on": "first"}, "train_on must be one of all, last; got 'first'"),
        ({"too_long": "keep"}, "too_long must be one of truncate, drop; got 'keep'"),
        ({"end_fill": 0}, "end_fill must be at least 1 token; got 0"),
        ({"block_size": 1}, "block_size must be at least 2 tokens; got 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UnmaskError, match=error):
        Encoder(byte_tokenizer(), **settings)


def test_tokenizers_that_lack_something() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UnmaskError, match=r"no chat template; use layout=separator"):
        Encoder(tokenizer, layout="chat")
    tokenizer.eos_token = None
    with pytest.raises(UnmaskError, match=r"no end token \(eos_token\)"):
        Encoder(tokenizer)


# Many records


def test_encode_records_reports_what_became_of_them() -> None:
    encoder = encoder_of("chatml", block_size=60)
    records: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "q", "output": "a"}, "x line 1"),
        ({"instruction": "q" * 99, "output": "a"}, "x line 2"),
        ({"instruction": "q", "output": "a" * 99}, "x line 3"),
        ({"prompt": "q" * 99, "completion": "a"}, "x line 4"),
        ({"prompt": "<|im_end|>", "completion": "a"}, "x line 5"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                       {"role": "user", "content": "r"}]}, "x line 6"),
    ]  # fmt: skip
    examples, report = encode_records(records, encoder)
    assert [row.record for row in examples] == [0, 2, 4, 5]
    assert len({row.sample_id for row in examples}) == 4
    assert (report.records, report.kept, report.truncated) == (6, 4, 1)
    reason = "response would vanish: the prompt alone fills block_size"
    assert report.dropped == {reason: (2, "x line 2")}
    assert report.formats == {"alpaca": 3, "prompt_completion": 2, "messages": 1}
    assert report.tokens == sum(len(row.input_ids) for row in examples)
    assert report.supervised_tokens == sum(row.supervised for row in examples)
    assert report.notes == {
        "held strings like special tokens, read as plain text": 1,
        "had turns after the last response, left out": 1,
    }


def test_many_records_equal_each_alone() -> None:
    encoder = ENCODERS["qwen"]
    names = CustomFields("question", None, "answer")
    tail = ["", "<|im_end|>", "\n", "<think>x</think>"]
    records = [({"question": f"q{i}", "answer": f"{tail[i % 4]}a{i}"}, f"line {i}") for i in range(600)]
    examples, report = encode_records(records, encoder, "custom", names)
    assert report.formats == {"custom": 600}
    for i, (record, _) in enumerate(records):
        conversation = talk(record["question"], record["answer"])
        alone = encoder.encode(conversation)
        assert (alone.input_ids, alone.src_mask) == (examples[i].input_ids, examples[i].src_mask)


def test_bad_record_stops_with_its_place() -> None:
    records = [({"instruction": "q", "output": ""}, "x.jsonl line 1")]
    with pytest.raises(UnmaskError, match=r"x\.jsonl line 1: field 'output' is empty"):
        encode_records(records, ENCODERS["chatml"])


def test_bad_records_are_skipped_with_their_reasons() -> None:
    good: dict[str, Any] = {"instruction": "q", "output": "a"}
    records: list[tuple[Any, str]] = [
        (good, "x line 1"),
        (RecordError("x line 2", "not valid JSON", " (column 3)"), "x line 2"),
        ({**good, "output": 1}, "x line 3"),
        (good, "x line 4"),
        (RecordError("x line 5", "not valid JSON", " (column 9)"), "x line 5"),
        ({"instruction": "q" * 99, "output": "a"}, "x line 6"),
    ]
    encoder = encoder_of("chatml", block_size=60)
    examples, report = encode_records(records, encoder, on_bad_record="skip")
    assert [row.record for row in examples] == [0, 3]
    assert report.skipped == {
        "not valid JSON": (2, "x line 2"),
        "field 'output' must be text": (1, "x line 3"),
    }
    assert list(report.dropped.values()) == [(1, "x line 6")]
    assert (report.records, report.kept, report.formats) == (6, 2, {"alpaca": 3})
    with pytest.raises(RecordError, match=r"^x line 2: not valid JSON \(column 3\)\.$"):
        encode_records(records, encoder)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_a_stream_is_encoded_as_it_is_read(batch: int) -> None:
    records = [({"instruction": f"q{i}", "output": f"a{i}"}, f"line {i}") for i in range(10)]
    read: list[int] = []

    def items() -> Iterator[tuple[dict[str, Any], str, int, int]]:
        for number, (record, where) in enumerate(records):
            read.append(number)
            yield record, where, 2, 7 * number

    report = EncodeReport()
    stream = encode_each(items(), ENCODERS["chatml"], batch=batch, report=report)
    first = next(stream)
    assert len(read) == min(batch, 10) and report.records == len(read)
    whole, _ = encode_records(records, ENCODERS["chatml"])
    rows = [first, *stream]
    assert [row.input_ids for row in rows] == [row.input_ids for row in whole]
    assert [row.record for row in rows] == list(range(0, 70, 7))
    assert (report.records, report.kept) == (10, 10)
