"""The server on 127.0.0.1, by OpenAI's own client; the model is one whose answers are known."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from serving import END, FakeModel, Running, served_by
from tiny import byte_model

from unmask.data.tokenizer import byte_tokenizer
from unmask.generation.prompts import prompt_example
from unmask.generation.text import complete
from unmask.serving.text import TextStream, split_calls


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served_by(FakeModel(), max_tokens=2000) as running:
        yield running


@pytest.fixture(autouse=True)
def _open_gate(server: Running) -> Iterator[None]:
    yield
    server.model.gate.set()


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def post(server: Running, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"content-type": "application/json", **more.pop("headers", {})}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=30, **more)


# Answers.


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=user("hé ho"), logprobs=True)
    choice = answer.choices[0]
    assert choice.message.content == "Hé HO" and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [token.token for token in choice.logprobs.content if token.bytes] == ["H", " ", "H", "O"]
    assert choice.logprobs.content[0].logprob == pytest.approx(-0.6931, abs=1e-4)
    usage: Any = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.forward_passes) == (25, 7, 7)


def test_max_tokens_stop_and_n(client: openai.OpenAI, server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        short = client.chat.completions.create(model="m", messages=user("hello"), **{name: 3})  # type: ignore[call-overload]
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("HEL", "length")
    cut = client.chat.completions.create(model="m", messages=user("hello"), stop=["LO", "x"])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("HEL", "stop")
    server.model.added.clear()
    several = client.completions.create(
        model="m", prompt=["ab", "cd"], n=2, seed=7, temperature=0.5, logit_bias={"5": 1}
    )
    assert [(one.index, one.text) for one in several.choices] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]
    assert [settings["seed"] for settings in server.model.added] == [7, 8, 7, 8]
    assert all(one["temperature"] == 0.5 and one["logit_bias"] == {5: 1.0} for one in server.model.added)


def test_settings_are_those_of_the_request_alone(client: openai.OpenAI, server: Running) -> None:
    server.model.added.clear()
    extra = {"unmask": {"policy": "threshold", "threshold": 0.7, "block_length": 4, "steps": 9, "top_k": 3}}
    client.chat.completions.create(
        model="m", messages=user("a"), temperature=1, top_p=0.5, max_tokens=12, extra_body=extra
    )
    client.chat.completions.create(model="m", messages=user("a"), top_p=1)
    first, second = server.model.added
    assert {
        **extra["unmask"],
        "temperature": 1,
        "top_p": 0.5,
        "max_new_tokens": 12,
        "seed": 0,
    }.items() <= first.items()
    assert second.keys() == {"seed", "unused_tokens"}


def test_completions_continue_texts_and_ids(client: openai.OpenAI) -> None:
    assert client.completions.create(model="m", prompt="one\ntwo").choices[0].text == "TWO"
    by_ids = client.completions.create(model="m", prompt=[list(b"ab"), list(b"c")], echo=True)
    assert [one.text for one in by_ids.choices] == ["abAB", "cC"]


def test_models_and_health(client: openai.OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"
    with pytest.raises(openai.NotFoundError, match="there is m"):
        client.models.retrieve("other")
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    page = httpx.get(server.url)
    assert (
        "<title>unmask playground" in page.text
        and "connect-src 'self'" in page.headers["content-security-policy"]
    )
    assert "http" not in page.text.replace("http-equiv", "")  # it loads nothing from elsewhere


def test_sixteen_at_once_in_an_async_client(server: Running) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model="m", messages=user(f"word {n}")) for n in range(16)))

    assert [one.choices[0].message.content for one in asyncio.run(ask())] == [f"WORD {n}" for n in range(16)]


# Streams.


def test_a_stream_has_what_is_final(client: openai.OpenAI) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="m", messages=user("hé"), **options))
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "H", "é", None]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.forward_passes == 4  # type: ignore[union-attr]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    for text, stop in (
        ("aab aac", ["AAC"]),
        ("über", []),
        ("tail of a stop", ["STOPS"]),
        ("<tool", ["<TOOL_"]),
    ):
        whole = client.completions.create(model="m", prompt=text, stop=stop, n=2)
        pieces = ["", ""]
        for chunk in client.completions.create(model="m", prompt=text, stop=stop, n=2, stream=True):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
        assert pieces == [one.text for one in whole.choices]


def test_drafts_show_the_canvas(client: openai.OpenAI) -> None:
    extra = {"unmask": {"drafts": True}}
    stream = client.chat.completions.create(
        model="m", messages=user("abc"), max_tokens=5, stream=True, extra_body=extra
    )
    extras = [chunk.model_extra or {} for chunk in stream]
    seen: list[Any] = [one["unmask"] for one in extras if "unmask" in one]
    assert [one["canvas"] for one in seen[:2]] == [["A", *[None] * 4], ["A", "B", *[None] * 3]]
    assert [one["new"] for one in seen[:2]] == [[0], [1]]
    assert seen[0]["confidence"] == [0.5, 0, 0, 0, 0]
    assert seen[-1]["ids"] == [*b"ABC", END] and seen[-1]["canvas"] == [*"ABC", "⏹", None]
    assert seen[-1]["forward_passes"] == 4


def test_text_is_held_back_until_nothing_can_change_it() -> None:
    stream = TextStream(byte_tokenizer(), ["stop", "§"], [END])
    ids, sent = list("a st so § é".encode()), ""
    for size in range(len(ids) + 1):
        new = stream.push(ids[:size])
        sent += new
        assert "\ufffd" not in new and "§" not in sent and not sent.endswith("s")
    assert sent == "a st so " == stream.text(ids)
    ended = TextStream(byte_tokenizer(), ["stop"], [END])
    assert ended.push(list(b"no s")) == "no " and ended.push([*b"no s", END, *b"top"]) == "s"


def test_calls_are_read_or_left_as_text() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>'
    assert split_calls(f"So: {call}\n{call}")[1] == [{"name": "f", "arguments": {"x": [1]}}] * 2
    for text in (
        "none",
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call>{oops}</tool_call>",
        f"{call}<tool_call>",
    ):
        assert split_calls(text) == (text, [])


# Refusals.

CHAT: dict[str, Any] = {"messages": user("x")}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
    ({"threshold": 0.5}, "unknown field 'threshold'; it is a field of 'unmask'."),
    ({"treshold": 0.5}, "unknown field 'treshold'; did you mean 'threshold', a field of 'unmask'?"),
    ({"unmask": {"temperature": 1}}, "'unmask.temperature'; it is a field of the request itself."),
    ({"unmask": {"temprature": 1}}, "did you mean 'temperature', a field of the request itself?"),
    ({"xyzzy": 1}, "unknown field 'xyzzy'; known are model, "),
    ({"unmask": {"threshhold": 1.0}}, "unknown field 'unmask.threshhold'; did you mean 'threshold'?"),
    ({"unmask": {"threshold": 2.0}}, "unmask.threshold: must be less than or equal to 1; got 2.0"),
    (
        {"unmask": {"guidance_scale": 1e38}},
        "unmask.guidance_scale: must be less than or equal to 1000; got 1e+38",
    ),
    ({"unmask": {"policy": "entropi"}}, "did you mean 'entropy'?"),
    ({"unmask": {"steps": 99, "preset": "llada-9"}}, "unknown preset"),
    ({"unmask": {"eta": 0.5, "policy": "threshold"}}, "eta has no effect"),
    ({"unmask": []}, "unmask: "),
    ({"unmask": {"timeout": 1e9}}, "unmask.timeout: "),
    ({"unmask": {"drafts": True}}, "no effect without stream"),
    ({"stream_options": {"include_usage": True}}, "no effect without stream"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "did you mean 'include_usage'?"),
    ({"temperature": -1}, "temperature: must be greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature: must be a valid number"),
    ({"temperature": True}, "temperature: must be a valid number"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": 10**30}, "more than the model's 4096 positions"),
    ({"max_tokens": 2500}, "max-batch-tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ({"n": 129}, "n: must be less than or equal to 128"),
    ({"n": 2, "seed": 2**63 - 1}, "seed must be at most"),
    ({"seed": 2**63}, "seed: "),
    ({"stop": ["", "a"]}, "stop: must be a text or a list of texts"),
    ({"stop": "x" * 300}, "at most 256 characters"),
    ({"stop": "\ud800"}, "stop: "),
    ({"logit_bias": {"a": 1}}, "logit_bias: must be an object of token ids"),
    ({"logit_bias": {"999": 1}}, "ids must be below 260"),
    ({"logit_bias": {"9": 101}}, "from -100 to 100"),
    ({"top_logprobs": 2}, "alternatives are not kept"),
    ({"frequency_penalty": 0.5}, "frequency_penalty: is not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format: only"),
    ({"tool_choice": "required"}, "calls are not forced"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no place for"),
    ({"tools": 3}, "tools: "),
    ({"messages": 3}, "messages: must be a valid list"),
    ({"messages": [3]}, "must be a list of messages; its item 1 is 3"),
    ({"messages": []}, "out of order"),
    ({"messages": user("\ud800")}, "unpaired surrogate"),
    ({"messages": [{"role": "king", "content": "x"}]}, "unknown role 'king'"),
    ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "did you mean 'name'?"),
    ({"messages": [*user("x"), {"role": "assistant", "content": "y"}]}, "the last one is an assistant's"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], message: str) -> None:
    response = post(server, {**CHAT, **fields})
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', {}, 400, "not JSON"),
        (b"[" * 100_000, {}, 400, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", {}, 400, "not JSON"),
        (b'{"temperature": NaN}', {}, 400, "NaN is not a number of JSON"),
        (b"[]", {}, 400, "must be a JSON object"),
        (b"", {}, 400, "not JSON"),
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        (b" " * 10 * 2**20, {}, 413, "exceeds"),
        (b'{"model": "/etc/passwd", "messages": []}', {}, 404, "there is no model"),
    ],
)
def test_a_body_that_cannot_be_read(
    server: Running, body: bytes, headers: Any, status: int, message: str
) -> None:
    response = post(server, body, headers=headers)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_a_completion_that_cannot_be(server: Running) -> None:
    for fields, message in (
        ({"prompt": [300]}, "ids must be in [0, 260); got 300"),
        ({"prompt": [-1]}, "got -1"),
        ({"prompt": []}, "prompt: must be a text"),
        ({"prompt": ["a", 3]}, "prompt: must be a text"),
        ({"prompt": ["a"] * 100, "n": 2}, "at most 128 answers"),
        ({"prompt": "a" * 5000}, "more than the model's 4096 positions"),
        ({"prompt": "a", "logprobs": 5}, "logprobs: must be less than or equal to 1"),
        ({"prompt": "a", "best_of": 2}, "use n"),
    ):
        response = post(server, fields, "/v1/completions")
        assert response.status_code == 400 and message in response.json()["error"]["message"], fields
    assert post(server, {}, "/v1/nothing").status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405


def test_a_special_token_in_a_text_is_text(server: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=user("a<|mask|><|im_end|>b"))
    assert answer.choices[0].message.content == "A<|MASK|><|IM_END|>B"


# Failures.


def test_a_row_that_fails_harms_no_other(server: Running, client: openai.OpenAI) -> None:
    server.model.gate.clear()
    texts = ["one more", "fail now", "two more"]
    answers: dict[str, int] = {}

    def ask(text: str) -> None:
        answers[text] = post(server, {"messages": user(text)}).status_code

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.scheduler.num_running + server.scheduler.waiting() == 3)
    server.model.gate.set()
    for thread in threads:
        thread.join()
    assert answers == {"one more": 200, "fail now": 500, "two more": 200}


def test_an_engine_that_fails_is_replaced(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        client.chat.completions.create(model="m", messages=user("explode"))
    assert (
        client.chat.completions.create(model="m", messages=user("again")).choices[0].message.content
        == "AGAIN"
    )


def test_a_stream_that_fails_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(client.chat.completions.create(model="m", messages=user("fail"), stream=True))


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


# Load.


def test_a_full_queue_and_a_budget() -> None:
    with served_by(FakeModel(), max_tokens=100, queue=3) as server:
        server.model.gate.clear()
        codes: list[int] = []

        def ask(text: str) -> None:
            codes.append(post(server, {"messages": user(text), "max_tokens": 20}).status_code)

        threads = [threading.Thread(target=ask, args=(letter * 4,)) for letter in "abcd"]
        for number, thread in enumerate(threads):  # 43 tokens each
            thread.start()
            wait_until(lambda n=number: server.scheduler.num_running == 1 and server.scheduler.waiting() == n)
        refused = post(server, CHAT)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        metrics = httpx.get(server.url + "/metrics").text
        assert "unmask_queue_requests 3\n" in metrics and "unmask_running_tokens 43\n" in metrics
        server.model.gate.set()
        for thread in threads:
            thread.join()
        assert codes == [200] * 4
        together = ["".join(sorted(chr(said[0]) for said in each)) for each in server.model.passes]
        assert together == [
            "a",
            *["ab"] * 4,
            "bc",
            *["cd"] * 4,
            "d",
        ]  # two at a time, first come first served
        metrics = httpx.get(server.url + "/metrics").text
        assert 'unmask_requests_total{route="/v1/chat/completions",status="200"} 4\n' in metrics
        assert 'unmask_requests_total{route="/v1/chat/completions",status="429"} 1\n' in metrics
        assert "unmask_completion_tokens_total 20\n" in metrics and "unmask_running_tokens 0\n" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server: Running, stream: bool) -> None:
    server.model.gate.clear()
    before, text = len(server.model.passes), f"leaving {stream}"
    with httpx.Client(timeout=0.3) as client:
        request = client.build_request(
            "POST",
            server.url + "/v1/chat/completions",
            json={
                "messages": user(text),
                "stream": stream,
            },
        )
        thread = threading.Thread(target=lambda: quiet(client.send, request))
        thread.start()
        wait_until(lambda: server.scheduler.num_running == 1)
    thread.join(10)  # closed
    wait_until(lambda: server.scheduler.left)  # the pass that began waits at the gate
    server.model.gate.set()
    wait_until(lambda: server.scheduler.num_running == 0)
    assert server.model.dropped[-1] == text.encode()
    assert len(server.model.passes) <= before + 1


def quiet(function: Any, *arguments: Any) -> None:
    with suppress(httpx.HTTPError):
        function(*arguments)


def test_one_that_leaves_the_queue_is_never_run(server: Running) -> None:
    server.model.gate.clear()
    thread = threading.Thread(target=post, args=(server, {"messages": user("first"), "max_tokens": 1900}))
    thread.start()
    wait_until(lambda: server.scheduler.num_running == 1)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            server.url + "/v1/chat/completions",
            json={"messages": user("never"), "max_tokens": 1900},
            timeout=0.3,
        )
    wait_until(lambda: server.scheduler.waiting() == 0)
    server.model.gate.set()
    thread.join()
    wait_until(lambda: not server.scheduler.rows)
    assert not any(b"never" in said for said in server.model.passes)


def test_a_request_has_a_time_limit(server: Running) -> None:
    server.model.gate.clear()
    try:
        response = post(server, {**CHAT, "unmask": {"timeout": 0.2}})
    finally:
        server.model.gate.set()
    assert response.status_code == 504 and "0.2 seconds" in response.json()["error"]["message"]
    wait_until(lambda: server.scheduler.num_running == 0)


def test_what_runs_is_finished_before_the_server_ends() -> None:
    with served_by(FakeModel()) as server:
        server.model.gate.clear()
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(post(server, {"messages": user("drain")}).json())
        )
        thread.start()
        wait_until(lambda: server.scheduler.num_running == 1)
        server.uvicorn.should_exit = True  # what uvicorn does on SIGTERM
        time.sleep(0.3)
        server.model.gate.set()
    thread.join()
    assert found[0]["choices"][0]["message"]["content"] == "DRAIN"


def test_half_open_and_slow_clients_leave_nothing_behind(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    threads = threading.active_count()
    sockets = []
    for sent in (
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n",
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        ),
        b"\x16\x03\x01\x02\x00" * 10,
    ):
        for _ in range(5):
            sockets.append(socket.create_connection((host, int(port))))
            sockets[-1].sendall(sent)
    assert post(server, CHAT).status_code == 200
    for each in sockets:
        each.close()
    wait_until(lambda: len(server.uvicorn.server_state.tasks) == 0)
    assert threading.active_count() == threads and server.scheduler.num_running == 0


@pytest.mark.slow
def test_misuse_leaves_nothing_behind_and_touches_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """500 requests, most of them hostile; no slot, thread or memory is kept."""
    with served_by(FakeModel()) as server, caplog.at_level(logging.CRITICAL):
        host, port = server.url.removeprefix("http://").split(":")
        good = {"messages": user("steady")}
        stream = json.dumps({**good, "stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        bodies: list[bytes] = [
            b"\xff\xfe",
            b"[" * 100_000,
            b"x" * 10 * 2**20,
            *(json.dumps({**good, **fields}).encode() for fields, _ in REFUSED),
            json.dumps({"messages": user("fail")}).encode(),
            json.dumps({"messages": user("explode")}).encode(),
        ]

        def misuse(number: int) -> None:
            if number % 4 == 0:  # half a request, or one whose answer is not read
                with socket.create_connection((host, int(port))) as half:
                    size = f"Content-Length: {len(stream)}\r\n\r\n".encode()
                    half.sendall(head + size + (stream if number % 8 else stream[:9]))
            else:
                quiet(post, server, bodies[number % len(bodies)])

        def ask_500() -> list[str]:
            found = []
            with ThreadPoolExecutor(16) as pool:
                for start in range(0, 500, 20):
                    done = pool.map(misuse, range(start, start + 19))
                    answer = post(server, good)
                    list(done)
                    if answer.status_code != 500:  # it was in the engine that exploded
                        found.append(answer.json()["choices"][0]["message"]["content"])
            wait_until(lambda: server.scheduler.num_running == 0 and not server.uvicorn.server_state.tasks)
            for told in (server.model.added, server.model.passes, server.model.engines, server.model.dropped):
                told.clear()
            return found

        def count_objects() -> int:
            gc.collect()
            return len(gc.get_objects())

        ask_500()  # what a process takes once
        threads, objects = threading.active_count(), count_objects()
        found = ask_500()
        assert set(found) == {"STEADY"} and len(found) > 12
        assert threading.active_count() <= threads and server.scheduler.waiting() == 0
        assert not server.scheduler.requests and not server.scheduler.left
        assert (
            count_objects() - objects < 500
        )  # the allocator's share of the process's memory is another matter


# Keys.


def test_only_health_answers_without_the_key() -> None:
    with served_by(FakeModel(), api_key="s3crét") as server:
        paths = ("/", "/metrics", "/v1/models", "/v1/models/m")
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer"},
            {"authorization": "Basic !"},
            {"authorization": "s3cr"},
        ):
            assert post(server, CHAT, headers=headers).status_code == 401
            assert post(server, b"\xff" * 2**21, headers=headers).status_code == 401
            for path in paths:
                response = httpx.get(server.url + path, headers=headers)
                assert response.status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        key = "Bearer s3crét".encode()
        for path in paths:
            assert httpx.get(server.url + path, headers={b"authorization": key}).status_code == 200
            assert httpx.get(server.url + path, auth=("anyone", "s3crét")).status_code == 200


# A model of the engine.

SETTINGS: list[dict[str, Any]] = [
    {},
    {"unmask": {"threshold": 0.3}},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"unmask": {"eta": 0.2}, "seed": 4},
    {"unmask": {"block_length": 4, "canvas": "growing"}},
    {"unmask": {"guidance_scale": 0.5, "steps": 12}},
    {"temperature": 1.0, "seed": 9, "stop": ["a", "e", "i"]},
    {"unmask": {"approximate_cache": "prefix", "block_length": 8}, "temperature": 0.5},
]


@pytest.mark.parametrize("leaving", [False, True])
def test_an_answer_is_the_one_that_complete_gives(leaving: bool) -> None:
    """32 at once, of 8 settings, some of whose clients leave in the middle."""
    model, tokenizer = byte_model().eval(), byte_tokenizer()
    asked = [("x" * (7 * n % 50) + str(n), SETTINGS[n % len(SETTINGS)]) for n in range(32)]

    def alone(text: str, fields: dict[str, Any]) -> str:
        settings = {**fields, **fields.get("unmask", {})}
        settings.pop("unmask", None)
        prompt = prompt_example(tokenizer, text)
        return complete(model, tokenizer, [prompt], max_new_tokens=24, **settings)[0].text

    async def ask(client: openai.AsyncOpenAI, number: int) -> str | None:
        text, fields = asked[number]
        own = {key: value for key, value in fields.items() if key != "unmask"}
        extra = {"unmask": fields.get("unmask", {})}
        create: Any = client.chat.completions.create
        options = {"model": "m", "messages": user(text), "max_tokens": 24, "extra_body": extra, **own}
        await asyncio.sleep(number % 5 / 100)
        if number % 3:
            return (await create(**options)).choices[0].message.content
        stream, parts = await create(stream=True, **options), []
        async for chunk in stream:
            parts.append(chunk.choices[0].delta.content or "")
            if leaving and number % 9 == 0 and len(parts) == 1:
                await stream.close()
                return None
        return "".join(parts)

    async def ask_all(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    with served_by(model) as server:
        found = asyncio.run(ask_all(server.url))
        wait_until(lambda: server.scheduler.num_running == 0)
        assert server.scheduler.forward_passes < 32 * 12  # together
    assert found.count(None) == 4 * leaving
    assert all(text in (None, alone(*one)) for text, one in zip(found, asked, strict=True))
