from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from tiny import Watched, byte_model
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unmask.data.encode import Example
from unmask.errors import UnmaskError
from unmask.generation.infill import Gap, infill_text, parse_gaps
from unmask.generation.prompts import raw_example, with_prefix


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("no gap", ["no gap"]),
        ("[[gap:5]]", [Gap(5, 5)]),
        ("a [[gap: 2 - 8 ]]b", ["a ", Gap(2, 8), "b"]),
        ("[[gap:1]][[gap:2]]", [Gap(1, 1), Gap(2, 2)]),
        ("x[[0]] = [[1, 2]]; [[Gap:5]] [gap:5]", ["x[[0]] = [[1, 2]]; [[Gap:5]] [gap:5]"]),
        (r"\[[gap:5]]", ["[[gap:5]]"]),
        (r"\[[gapped", ["[[gapped"]),
        (r"\\[[gap:5]]", ["\\", Gap(5, 5)]),
        (r"\\\[[gap:5]]", [r"\[[gap:5]]"]),
    ],
)
def test_gaps_are_found_and_nothing_else_is_changed(text: str, parts: list[Any]) -> None:
    assert parse_gaps(text) == parts


@pytest.mark.parametrize("text", ["one\ntwo [[gap]]", "[[gap:1-2-3]]", "[[gap:0]]", "[[gap:8-2]]"])
def test_what_looks_like_a_gap_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(UnmaskError, match="gap"):
        parse_gaps(text)


def plain(model: Any, row: list[int | None], **settings: Any) -> tuple[list[int], float]:
    """Fill one row by `model.infill`: its ids, and the log-probability of what was written."""
    ids = torch.tensor([[0 if one is None else one for one in row]])
    is_gap = torch.tensor([[one is None for one in row]])
    out = model.infill(ids, is_gap, return_trace=True, **settings)
    return out.sequences[0].tolist(), out.confidence[is_gap].double().log().sum().item()


def test_known_lengths_are_filled_as_model_infill_does(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    done = infill_text(model, tokenizer, ["ab", Gap(2, 2), "c<|mask|>", Gap(1, 1)])
    ids, score = plain(model, [*b"ab", None, None, *b"c<|mask|>", None])
    assert done.text == tokenizer.decode(ids) and done.num_forwards == 3
    assert done.tried == [((2, 1), pytest.approx(score))]
    assert done.parts[0] == "ab" and done.parts[2] == "c<|mask|>"  # kept as text


def after(model: Any, row: list[int | None]) -> float:
    """log p of what stands after the first gap, all of it masked, by the model's own forward."""
    first = row.index(None)
    masked = [259 if one is None or place >= first else one for place, one in enumerate(row)]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([masked])).logits[0].log_softmax(dim=-1)
    return sum(log_p[place, one].item() for place, one in enumerate(row) if place > first and one is not None)


def test_of_the_lengths_the_likeliest_text_wins(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    parts = ["ab", Gap(1, 3), "c", Gap(2, 3), "d"]
    scores = {}
    for first, second in product((1, 2, 3), (2, 3)):
        row: list[int | None] = [*b"ab", *[None] * first, *b"c", *[None] * second, *b"d"]
        scores[first, second] = plain(model, row)[1] + after(model, row)
    assert len(set(scores.values())) == 6
    for batch_size in (1, 4, 16):
        done = infill_text(model, tokenizer, parts, batch_size=batch_size)
        assert dict(done.tried) == pytest.approx(scores)
        assert done.tried == sorted(done.tried, key=lambda one: -one[1])


def test_an_answer_stands_between_its_prompt_and_its_end_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = raw_example(tokenizer, "Q")
    for text, ends in ((b"a", 1), (b"ab", 4)):  # a multiple of four tokens
        parts = [text.decode(), Gap(2, 2)]
        done = infill_text(model, tokenizer, parts, prompt=prompt, end=258, end_fill=4)
        ids, score = plain(model, [*b"Q", *text, None, None, *[258] * ends])
        assert done.text == tokenizer.decode(ids[1:-ends]) and done.tried[0][1] == pytest.approx(score)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        (["ab"], {}, "no gap"),
        (["a", Gap(1, 2)], {}, "after the last gap"),
        ([Gap(1, 100), Gap(1, 100), "a"], {}, "10,000 combinations"),
        ([Gap(300, 300)], {}, "256 positions"),
        (["a", Gap(2, 2)], {"steps": 3}, "steps"),
    ],
)
def test_what_cannot_be_filled_is_said(
    model: Any, tokenizer: PreTrainedTokenizerBase, parts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnmaskError, match=message):
        infill_text(model, tokenizer, parts, **settings)


@pytest.fixture(scope="module")
def spacing() -> PreTrainedTokenizerBase:
    """A tokenizer that puts a space before every text, as SentencePiece's do."""
    pieces = ["<unk>", "</s>", "\n", "▁", *"abcdehps", "▁a", "▁e", "▁sp"]
    merges = [("▁", "a"), ("▁", "e"), ("s", "p"), ("▁", "sp")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "sp"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_no_space_is_written_around_a_gap(spacing: PreTrainedTokenizerBase) -> None:
    """The ids around a gap are those of the whole text, and the gap's own space stays."""
    for gap, text in (("e", "speech"), ("▁a", "sp aech")):
        only, model = spacing.convert_tokens_to_ids(gap), Watched()
        others = [token for token in range(260) if token != only]
        done = infill_text(model, spacing, ["sp", Gap(1, 1), "ech"], suppress_tokens=others)
        assert done.text == text
        assert spacing.convert_ids_to_tokens(model.asked[0]) == ["▁sp", "<unk>", "e", "c", "h"]
    line, tag = spacing.get_vocab()["\n"], spacing.get_vocab()["c"]
    after_a_line, after_a_tag = Example([line], [True]), Example([tag], [True])
    for before, first in ((after_a_line, "a"), (after_a_tag, "▁a"), (raw_example(spacing, "b"), "a")):
        ids = with_prefix(before, "a", spacing).input_ids[len(before.input_ids) :]
        assert spacing.convert_ids_to_tokens(ids) == [first]
