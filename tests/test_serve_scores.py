"""The server's likelihoods, gaps and adapters, against the library called directly."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import Running, running, served_by
from tiny import byte_model, tiny_model

from unmask.data.encode import Encoder
from unmask.data.records import Conversation, Turn
from unmask.data.tokenizer import byte_tokenizer
from unmask.diffusion.likelihood import likelihood
from unmask.errors import UnmaskError
from unmask.generation.infill import infill_text, parse_gaps
from unmask.generation.prompts import chat_encoder, prompt_example
from unmask.generation.text import complete
from unmask.model.checkpoint import add_adapter, fingerprint, load_model, save_checkpoint
from unmask.serving.run import load_models
from unmask.serving.scoring import left_to_right

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served_by(byte_model().eval()) as running:
        yield running


def post(server: Running, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=fields, timeout=60)


def answered(server: Running, path: str, **fields: Any) -> Any:
    response = post(server, path, **fields)
    assert response.status_code == 200, response.text
    return response.json()


# Likelihood from left to right.


@pytest.mark.parametrize(
    "fields", [{}, {"logit_shift": True}, {"attention": "block_causal", "block_length": 2}]
)
def test_the_probabilities_of_all_texts_sum_to_one(fields: dict[str, Any]) -> None:
    model = tiny_model(vocab_size=6, mask_token_id=5, **fields).eval()
    total = 0.0
    for ids in itertools.product(range(6), repeat=3):
        total += math.exp(sum(one.logprob for one in left_to_right(model, ids, lambda: None)))
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fields", [{}, {"attention": "block_causal", "block_length": 3}])
def test_a_token_is_scored_as_generation_would_write_it(fields: dict[str, Any]) -> None:
    """The likeliest token of each place is what the policy left_to_right commits there."""
    model = byte_model(**fields).double().eval()
    ids = list(b"abc")
    for _ in range(4):
        canvas = [*ids, 0]
        [done] = complete(
            model, TOKENIZER, [ids], max_new_tokens=1, keep_states=True, eos_token_id=[], unused_tokens=[]
        )
        scored = left_to_right(model, canvas, lambda: None)[-1]
        probability = math.exp(left_to_right(model, [*ids, *done.ids], lambda: None)[-1].logprob)
        assert scored.best in (done.ids[0], 259)  # a mask is never written
        assert probability <= done.confidence[0] + 1e-5  # which is without the mask token
        ids += done.ids


def test_echo_scores_the_prompt_as_an_evaluation_reads_it(server: Running) -> None:
    """As lm-evaluation-harness asks: ids of a context and its continuation, of which it sums the tail."""
    prompts = [list(b"one two"), list(b"three")]
    body = answered(
        server, "/v1/completions", prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        expected = left_to_right(server.model, prompt, lambda: None)
        table = choice["logprobs"]
        assert len(table["tokens"]) == len(prompt) + 1 and choice["text"].startswith(bytes(prompt).decode())
        assert table["token_logprobs"][:-1] == pytest.approx([one.logprob for one in expected], abs=1e-6)
        assert table["text_offset"] == list(range(len(prompt) + 1))
        for one, top in zip(expected, table["top_logprobs"], strict=False):
            assert max(top.values()) == pytest.approx(one.best_logprob, abs=1e-6)
        [done] = complete(server.model, TOKENIZER, [prompt], max_new_tokens=1, keep_states=True)
        assert table["token_logprobs"][-1] == pytest.approx(math.log(done.confidence[0]), abs=1e-5)
    alone = answered(server, "/v1/completions", prompt=prompts, max_tokens=0, echo=True, logprobs=1)
    assert [one["text"] for one in alone["choices"]] == ["one two", "three"]
    assert len(alone["choices"][1]["logprobs"]["tokens"]) == 5


def test_a_score_is_that_of_likelihood(server: Running) -> None:
    conversation = Conversation((Turn("user", "Hi"), Turn("assistant", "Yes.")), "here")
    example = chat_encoder(TOKENIZER).encode(conversation)
    size = (
        example.input_ids.index(258, example.src_mask.index(False)) + 1
    )  # without what follows the end token
    batch = {
        "input_ids": torch.tensor([example.input_ids[:size]]),
        "src_mask": torch.tensor([example.src_mask[:size]]),
    }
    expected = likelihood(server.model, batch, num_samples=8, seed=3)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    [found] = answered(server, "/v1/score", messages=messages, samples=8, seed=3)["scores"]
    assert found["nats"] == pytest.approx(expected.nll.item(), rel=1e-6)
    assert found["stderr"] == pytest.approx(expected.stderr.item(), rel=1e-6)
    assert found["tokens"] == 5 and sum(nats for _, nats in found["token_nats"]) == pytest.approx(
        found["nats"]
    )
    ids = torch.tensor([list(b"ab cd")])
    given = torch.tensor([[True] * 3 + [False] * 2])
    expected = likelihood(
        server.model, {"input_ids": ids, "src_mask": given}, estimator="chain", num_samples=4
    )
    [found] = answered(server, "/v1/score", prompt="ab ", text="cd", samples=4, estimator="chain")["scores"]
    assert found["nats"] == pytest.approx(expected.nll.item(), rel=1e-6)


def test_a_response_is_filled_with_end_tokens_as_in_training(server: Running) -> None:
    conversation = Conversation((Turn("user", "Hi"), Turn("assistant", "Yes.")), "here")
    example = Encoder(TOKENIZER, layout="chat", train_on="last", end_fill=16).encode(conversation)
    batch = {
        "input_ids": torch.tensor([example.input_ids]),
        "src_mask": torch.tensor([example.src_mask]),
    }
    expected = likelihood(server.model, batch, num_samples=8)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    [found] = answered(server, "/v1/score", messages=messages, samples=8, end_fill=16)["scores"]
    assert found["tokens"] == 16 and found["nats"] == pytest.approx(expected.nll.item(), rel=1e-6)
    refused = post(server, "/v1/score", text="Yes.", end_fill=16)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "end_fill"


def test_answers_go_on_while_a_text_is_scored(server: Running) -> None:
    """A long score lets generations pass between its forward passes, and ends when its client leaves."""
    before, headers = server.scheduler.forward_passes, {"Content-Type": "application/json"}
    client = http.client.HTTPConnection(server.url.removeprefix("http://"))
    body = json.dumps({"text": ["x" * 200] * 20, "samples": 1024})
    client.request("POST", "/v1/score", body, headers)
    while server.scheduler.forward_passes < before + 3:
        time.sleep(0.01)
    answered(server, "/v1/completions", prompt="ab", max_tokens=4)
    assert select.select([client.sock], [], [], 0) == ([], [], [])  # it is not done yet
    client.close()
    answered(server, "/v1/score", text="ab", samples=2)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("score", {}, "give messages, of which the last is scored, or text"),
        ("score", {"text": "a", "samples": 3}, "samples: must be a multiple of 2"),
        ("score", {"text": "a", "estimator": "best"}, "estimator must be one of exact_k"),
        ("score", {"text": ["a", "b", "c"], "prompt": ["a", "b"]}, "one for each of the 3"),
        ("score", {"text": "a" * 300}, "more than the model's 256 positions"),
        ("score", {"messages": [{"role": "user", "content": "a"}]}, "there is no assistant turn"),
        ("infill", {}, "give text with gaps"),
        ("infill", {"text": "no gap"}, "there is nothing to fill"),
        ("infill", {"text": "[[gap:1-3]]"}, "one length here"),
        ("infill", {"text": "[[gap]]"}, "is not a gap"),
        ("infill", {"text": "[[gap:9999]]"}, "more than the model's 256 positions"),
        ("infill", {"canvas": [None, 777]}, "ids must be below 260; got 777"),
        ("infill", {"canvas": [None, -1]}, "canvas: "),
        ("infill", {"text": "[[gap:2]]", "stop": "a"}, "stop: has no effect in a gap"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1 without echo"),
        ("completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo does not go with suffix"),
        ("completions", {"prompt": "a", "suffix": "b", "stop": "c"}, "stop has no effect with suffix"),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "is not streamed"),
    ],
)
def test_what_cannot_be_scored_or_filled_is_refused(
    server: Running, path: str, fields: dict[str, Any], message: str
) -> None:
    response = post(server, f"/v1/{path}", **fields)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


# Gaps.


def test_a_suffix_is_seen_by_what_comes_before_it(server: Running) -> None:
    body = answered(server, "/v1/completions", prompt="ab", suffix="yz", max_tokens=4)
    expected = infill_text(server.model, TOKENIZER, parse_gaps("ab[[gap:4]]yz"))
    assert "ab" + body["choices"][0]["text"] + "yz" == expected.text
    assert body["usage"]["prompt_tokens"] == 4 and body["usage"]["completion_tokens"] == 4
    other = answered(server, "/v1/completions", prompt="ab", suffix="QQ", max_tokens=4)
    assert other["choices"][0]["text"] != body["choices"][0]["text"]


def test_gaps_of_a_text_are_filled(server: Running) -> None:
    text = "a [[gap:2]] b [[gap:3]] c"
    body = answered(server, "/v1/infill", text=text, temperature=1.0, seed=5)
    assert (
        body["text"] == infill_text(server.model, TOKENIZER, parse_gaps(text), temperature=1.0, seed=5).text
    )
    lines = httpx.post(server.url + "/v1/infill", json={"text": text, "stream": True}, timeout=60).text.split(
        "\n\n"
    )
    assert len(lines) == 5 + 2 and lines[-2] == "data: [DONE]"  # a forward pass for each of five tokens


def test_tokens_of_an_answer_are_masked_again(server: Running) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    canvas: list[int | None] = [*b"hello", 258, 258]
    again = list(canvas)
    again[1] = again[3] = None
    body = answered(server, "/v1/infill", messages=messages, canvas=again)
    found = body["unmask"]["canvas_ids"]
    prompt = prompt_example(TOKENIZER, "Hi").input_ids
    ids = torch.tensor([[*prompt, *(token or 0 for token in again)]])
    is_gap = torch.tensor([[False] * len(prompt) + [token is None for token in again]])
    expected = server.model.infill(ids, is_gap, unused_tokens=[]).sequences[0, len(prompt) :].tolist()
    assert found == expected
    assert [token for token, was in zip(found, again, strict=True) if was is not None] == [*b"hlo", 258, 258]


# Adapters.


def adapted(folder: Path, base: Path, seed: int, learn_mask: bool = False) -> Path:
    """Adapters with random weights that change the answers."""
    model: Any = load_model(str(base))
    weights = fingerprint(model)
    model = add_adapter(model, str(base), r=4, alpha=8, learn_mask=learn_mask)
    model.config.base_fingerprint = weights
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    save_checkpoint(model, TOKENIZER, folder)
    return folder


@pytest.mark.parametrize("learn_mask", [False, True])
def test_adapters_are_models_of_their_own(tmp_path: Path, learn_mask: bool) -> None:
    base = tmp_path / "base"
    save_checkpoint(byte_model(), TOKENIZER, base)
    folders = {
        name: str(adapted(tmp_path / name, base, n, learn_mask)) for n, name in enumerate(("one", "two"))
    }
    models, activate = load_models(str(base), folders)
    assert [served.name for served in models] == [str(base), "one", "two"]
    texts = [f"word {n}" for n in range(4)]
    expected = {}
    for name, folder in {str(base): str(base), **folders}.items():
        alone = load_model(folder)
        prompts = [prompt_example(TOKENIZER, text) for text in texts]
        expected[name] = [done.text for done in complete(alone, TOKENIZER, prompts, max_new_tokens=12)]
    assert len({tuple(answers) for answers in expected.values()}) == 3
    found: dict[str, dict[int, str]] = {name: {} for name in expected}
    with running(models, activate=activate) as server:

        def ask(name: str, number: int) -> None:
            messages = [{"role": "user", "content": texts[number]}]
            body = answered(server, "/v1/chat/completions", model=name, messages=messages, max_tokens=12)
            found[name][number] = body["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(name, n)) for n in range(4) for name in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scores = [
            answered(server, "/v1/score", model=name, text="ab", samples=2)["scores"][0]["nats"]
            for name in expected
        ]
    assert {name: [by[n] for n in range(4)] for name, by in found.items()} == expected
    assert len(set(scores)) == 3


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    save_checkpoint(byte_model(), TOKENIZER, base)
    save_checkpoint(byte_model(seed=1), TOKENIZER, other)
    folder, second = (str(adapted(tmp_path / f"{n}", base, n, learn_mask=n == 2)) for n in (1, 2))
    for name, adapters, message in (
        (other, {"one": folder}, "other weights"),
        (base, {"one": str(base)}, "not a folder of LoRA adapters"),
        (base, {str(base): folder}, "the model's own"),
        (base, {"one": folder, "two": second}, "learn_mask"),
        (folder, {"one": folder}, "has adapters itself"),
    ):
        with pytest.raises(UnmaskError, match=message):
            load_models(str(name), adapters)
