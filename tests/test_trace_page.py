from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unmask.generation.complete import Completion
from unmask.generation.trace_page import trace_data, write_trace_page

MASK, END = 259, 258
STATES = [
    [MASK, *b"b", MASK, END],
    [*b"a", MASK, MASK, END],
    [*b"ac", END, END],
]
ANSWER = Completion("ac", [*b"ac", END], [1, 2, 2], [0.5, 0.75, 1.0], [0.7, 0.3, 0.0], 3, STATES)


def test_a_page_plays_what_each_step_changed(tokenizer: PreTrainedTokenizerBase) -> None:
    data = trace_data(ANSWER, tokenizer)
    assert data["frames"] == [
        [[1, "b"], [3, "▪"]],
        [[0, "a"], [1, None]],
        [[1, "c"], [2, "▪"]],
    ]
    assert data["bars"] == [[2, 0], [1, 1], [2, 0]]
    assert (data["length"], data["kept"], data["committed"]) == (4, 3, [1, 2, 2])
    assert data["figures"] == "3 tokens in 3 forwards: 1.00 tokens a forward. Canvas of 4 tokens."


def test_a_character_of_two_tokens_is_drawn_when_it_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = "é".encode()
    answer = Completion(
        "é", [first, second], [1, 0], [1.0, 1.0], [0.0, 0.0], 2, [[MASK, second], [first, second]]
    )
    assert trace_data(answer, tokenizer)["frames"] == [[[1, "\ufffd"]], [[0, ""], [1, "é", 0]]]


def test_the_page_needs_nothing_else_and_shows_text_as_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    odd = "</script><script>alert(1)</script>"
    state = list(odd.encode())
    answer = Completion(odd, state, [0] * len(state), [1.0] * len(state), [0.0] * len(state), 1, [state])
    file = tmp_path / "trace.html"
    write_trace_page(file, [ANSWER, answer], tokenizer, title="<b>t</b>", prompt=odd + "\x1b")
    text = file.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<b>t</b>" not in text and "\x1b" not in text
    assert not re.search(r"https?:|src=|href=|@import|url[(]", text)
    assert "default-src 'none'" in text
    found = re.search(r'id="data">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert [one["name"] for one in data] == ["answer 1", "answer 2"]
    assert data[1]["prompt"] == odd + "␛"
    assert "".join(change[1] for change in data[1]["frames"][0]) == odd
