from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.data.records import Conversation, Turn
from unmask.data.encode import Encoder
from unmask.data.tokenizer import byte_tokenizer
from unmask.errors import UnmaskError
from unmask.generation.complete import (
    Completion,
    begun,
    chat_example,
    chat_turns,
    complete,
)

PROMPTS = [b"a longer prompt", b"ab", b"", b"xyz", b"ab", b"another one"]
SETTINGS = {"max_new_tokens": 8, "eos_token_id": list(range(0, 250, 7))}


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completions_come_in_order_and_do_not_depend_on_the_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    alone = [complete(model, tokenizer, [ids], temperature=temperature, **SETTINGS)[0] for ids in prompts]
    assert len({tuple(done.ids) for done in alone}) > 3
    for batch_size in (1, 2, 4, 64):
        together = complete(
            model, tokenizer, prompts, batch_size=batch_size, temperature=temperature, **SETTINGS
        )
        assert together == alone


def test_a_completion_is_what_generate_says(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = list(b"hello")
    [done] = complete(model, tokenizer, [ids], **SETTINGS)
    out = model.generate(torch.tensor([ids]), return_trace=True, **SETTINGS)
    kept = out.commit_step[0] >= 0
    assert done.ids == out.sequences[0, 5:][kept].tolist()
    assert done.commit_step == out.commit_step[0][kept].tolist()
    assert done.text == tokenizer.decode(done.ids, skip_special_tokens=True)


def test_special_tokens_are_no_part_of_the_text(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    only_end = [i for i in range(259) if i != 258]
    [done] = complete(model, tokenizer, [list(b"hi")], max_new_tokens=4, suppress_tokens=only_end)
    assert done.ids[-1] == 258
    assert done.text == ""


def test_progress_is_told_after_each_batch(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    told: list[int] = []
    prompts = [list(prompt) for prompt in PROMPTS]
    complete(model, tokenizer, prompts, batch_size=4, advance=told.append, max_new_tokens=1)
    assert told == [4, 2]


def test_no_prompt_no_completion(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    assert complete(model, tokenizer, []) == []


def test_a_prompt_that_does_not_fit_is_refused(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnmaskError, match="a prompt of 300 tokens"):
        complete(model, tokenizer, [list(b"x" * 300)], max_new_tokens=4)


def test_chat_prompt_is_the_prefix_that_training_shows(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("system", "Be short."), Turn("user", "Hi <|im_end|>"), Turn("assistant", "Hello"))
    example = Encoder(tokenizer, layout="chat").encode(Conversation(turns, "here"))
    prompt = chat_example(tokenizer, chat_turns("Hi <|im_end|>", "Be short.")).input_ids
    assert prompt == example.input_ids[: example.src_mask.index(False)]
    # A special token's string in what the user says is plain text: the only real ones are the template's.
    assert sum(i >= 256 for i in prompt) == 5


def test_without_a_chat_template_the_remedy_is_named() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(UnmaskError, match="no chat template"):
        chat_example(bare, chat_turns("Hi"))


def test_stop_texts_end_a_response_in_any_batch(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    free = complete(model, tokenizer, prompts, max_new_tokens=8)
    stop = sorted({done.text[3] for done in free if len(done.text) > 3})
    cut = complete(model, tokenizer, prompts, max_new_tokens=8, stop=stop, policy="left_to_right")
    longer = complete(model, tokenizer, prompts, max_new_tokens=8, policy="left_to_right")
    for short, whole in zip(cut, longer, strict=True):
        place = min((whole.text.find(one) for one in stop if one in whole.text), default=len(whole.text))
        assert short.text == whole.text[:place]
        assert short.ids == whole.ids[: len(short.ids)]
    assert any(len(short.ids) < len(whole.ids) for short, whole in zip(cut, longer, strict=True))


def test_states_show_the_canvas_after_each_step(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [list(b"ab"), list(b"hello")]
    done = complete(model, tokenizer, prompts, keep_states=True, max_new_tokens=6, threshold=0.05)
    for one in done:
        assert len(one.states) == one.forwards
        for place, (token, step) in enumerate(zip(one.ids, one.commit_step, strict=True)):
            assert [state[place] for state in one.states] == [259] * step + [token] * (one.forwards - step)
        assert len(one.confidence) == len(one.entropy) == len(one.ids)
    assert complete(model, tokenizer, prompts, max_new_tokens=2)[0].states == []


def test_earlier_responses_are_cut_into_blocks_as_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(attention="block_causal", block_length=4).double().eval()
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes indeed"), Turn("user", "And?")]
    example = chat_example(tokenizer, turns)
    [done] = complete(model, tokenizer, [example], max_new_tokens=1)
    # Training masks the last token of the same conversation, and sees it by its own forward.
    whole = Encoder(tokenizer, layout="chat").encode(Conversation((*turns, Turn("assistant", "X")), "here"))
    size = len(example.input_ids)
    assert whole.input_ids[:size] == example.input_ids and whole.src_mask[:size] == example.src_mask
    ids = torch.tensor([[*example.input_ids, 259]])
    source = torch.tensor([[*example.src_mask, False]])
    logits = model(input_ids=ids, src_mask=source, training_mode="sft").logits[0, -1]
    logits[259] = -torch.inf
    assert done.confidence[0] == pytest.approx(logits.softmax(dim=0).max().item(), rel=1e-5)
    [other] = complete(model, tokenizer, [example.input_ids], max_new_tokens=1)
    assert other.confidence[0] != pytest.approx(done.confidence[0], rel=1e-5)


def test_a_begun_response_goes_on(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = chat_example(tokenizer, chat_turns("Hi"))
    example = begun(prompt, "We<|mask|>", tokenizer)
    assert example.input_ids == prompt.input_ids + list(b"We<|mask|>")
    assert example.src_mask == [True] * len(prompt.input_ids) + [False] * 10


def test_completion_is_plain_data() -> None:
    assert Completion("a", [1], [0]) == Completion("a", [1], [0])
