"""Completions of prompts, and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import byte_model
from transformers import PreTrainedTokenizerBase

from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import Decision, Proposal, most_confident
from unmask.generation.prompts import prompt_example
from unmask.generation.text import StopStrings, complete, completions

PROMPTS = [list(text) for text in (b"a longer prompt", b"ab", b"", b"xyz", b"ab", b"another one")]
SETTINGS = {"max_new_tokens": 8, "eos_token_id": list(range(0, 250, 7))}


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().double().eval()


@pytest.mark.parametrize("fields", [{}, {"attention": "block_causal", "block_length": 4}], ids=str)
def test_a_completion_is_what_generate_returns_in_any_batch(
    tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any]
) -> None:
    model, settings = byte_model(**fields).double().eval(), {"temperature": 1.0, **SETTINGS}
    counts: list[int] = []
    found = complete(model, tokenizer, PROMPTS, batch_size=4, advance=counts.append, **settings)
    assert counts == [1] * 6 and len({tuple(done.ids) for done in found}) > 3
    for ids, done in zip(PROMPTS, found, strict=True):
        out = model.generate(torch.tensor([ids], dtype=torch.long), return_trace=True, **settings)
        in_answer = out.commit_step[0] >= 0
        assert done.ids == out.sequences[0, len(ids) :][in_answer].tolist()
        assert done.commit_step == out.commit_step[0][in_answer].tolist()
        assert done.text == tokenizer.decode(done.ids, skip_special_tokens=True)
        assert done.num_forwards == out.num_forwards.item() and done.states == []
    assert complete(model, tokenizer, PROMPTS, **settings) == found
    assert complete(model, tokenizer, []) == []
    with pytest.raises(UnmaskError, match="300 tokens"):
        complete(model, tokenizer, [list(b"x" * 300)], max_new_tokens=4)


@pytest.mark.parametrize(
    "settings", [{"generation_config": DiffusionGenerationConfig(max_new_tokens=700)}, {"preset": "coda"}]
)
def test_the_cache_has_room_for_any_canvas(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = byte_model(attention="block_causal", block_length=32, max_position_embeddings=1024).eval()
    settings |= {"threshold": 0.001, "policy": "threshold", "temperature": 0.0, "eos_token_id": []}
    [done] = complete(model, tokenizer, [[65]], **settings)
    assert len(done.ids) >= 700


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stop": "end"}, "stop must be a list of strings; got 'end'"),
        ({"seed": [1, 2]}, "seed: 2 numbers for 1 prompts"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ],
)
def test_a_setting_of_another_number_is_refused(
    settings: dict[str, Any], message: str, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UnmaskError, match=message):
        complete(model, tokenizer, [[65]], max_new_tokens=4, **settings)


def test_two_calls_at_once_on_one_engine_are_refused(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = model.make_engine()
    each = [{"max_new_tokens": 1, "stop": None}, {"max_new_tokens": 3}]
    first = completions(model, tokenizer, [[65], [66]], engine=engine, each=each)
    next(first)
    complete(model, tokenizer, [[67]], engine=engine, max_new_tokens=8)
    with pytest.raises(UnmaskError, match="another call took the events"):
        list(first)


def test_a_text_is_a_prompt_of_a_user(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Hi", "Hello there"]
    encoded = [prompt_example(tokenizer, text) for text in texts]
    assert complete(model, tokenizer, texts, max_new_tokens=6) == complete(
        model, tokenizer, encoded, max_new_tokens=6
    )
    with pytest.raises(UnmaskError, match="put it into a list"):
        complete(model, tokenizer, "Hi", max_new_tokens=6)


def test_states_show_the_canvas_after_each_step(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [list(b"ab"), list(b"hello")]
    for done in complete(model, tokenizer, prompts, keep_states=True, max_new_tokens=6, threshold=0.05):
        steps = done.num_forwards
        assert len(done.states) == steps and len(done.confidence) == len(done.entropy) == len(done.ids)
        for position, (token, step) in enumerate(zip(done.ids, done.commit_step, strict=True)):
            assert [state[position] for state in done.states] == [259] * step + [token] * (steps - step)


# Stop strings.


def remask_all(proposal: Proposal) -> Decision:
    """Commit the most confident, and once mask everything again."""
    best = most_confident(proposal.confidence, proposal.candidates, proposal.quota)
    return Decision(best, proposal.committed & (proposal.step == 4)[:, None])


@pytest.mark.parametrize("policy", ["left_to_right", "remdm_cap", "remdm_rescale", remask_all])
@pytest.mark.parametrize("block_length", [None, 4])
def test_a_stop_string_waits_for_what_is_final(
    model: Any, tokenizer: PreTrainedTokenizerBase, policy: Any, block_length: int | None
) -> None:
    """A draft that would be masked again ends nothing: the answer is that without the stop string, cut."""
    eta = 1.0 if "remdm" in str(policy) else None
    settings = {"max_new_tokens": 12, "temperature": 1.0, "policy": policy, "eta": eta, **SETTINGS}
    settings |= {"block_length": block_length, "seed": list(range(30))}
    prompts = [PROMPTS[row % 3] for row in range(30)]
    whole = complete(model, tokenizer, prompts, **settings)
    stop = list("aeiou#%QX")
    cut = complete(model, tokenizer, prompts, stop=stop, **settings)
    cutter = StopStrings(tokenizer, stop)
    assert [done.text for done in cut] == [cutter.cut(done.text) for done in whole]
    shorter = sum(short.num_forwards < long.num_forwards for short, long in zip(cut, whole, strict=True))
    assert any(short.text != long.text for short, long in zip(cut, whole, strict=True))
    assert (shorter > 0) == (block_length is not None or policy == "left_to_right")  # later steps are saved


@pytest.mark.parametrize("text", ["", "ab", "xy.", "..x", "x\n\né", "é"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    stop, prompt = StopStrings(tokenizer, ["é", ".x"]), "é .x."  # none of the prompt counts
    ids = list((prompt + text).encode())
    start = len(prompt.encode())
    for end in range(start, len(ids) + 1):
        answer = bytes(ids[start:end]).decode(errors="replace")
        met = stop(torch.tensor([ids[:end]]), None, prompt_length=start)
        assert bool(met) == ("é" in answer or ".x" in answer)
    assert StopStrings(tokenizer, ["c", "bc"]).cut("abcd") == "a" and stop.cut("xyz") == "xyz"
    with pytest.raises(UnmaskError, match="stop"):
        StopStrings(tokenizer, ["a", ""])
