"""`unmask serve` over 127.0.0.1: are answers those of the library, how fast are many at once, what does misuse leave.

    python benchmarks/serve.py [--model outputs/demo/final]

1. 32 requests at once with 8 settings, prompts of mixed lengths: every answer is that of `complete` alone; again
   with clients that leave in the middle.
2. Answers to 8 clients at once against the same one after the other, and against the same offline in one batch.
3. Time to the first content over the time of the whole answer, of answers of four blocks.
4. 500 requests, a part of them hostile: slots, threads and memory of the server before and after.

Ratios are of one run. The model is that of `make demo`; takes about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import torch

from unmask import load_model, load_tokenizer
from unmask.generation.prompts import prompt_example
from unmask.generation.text import complete

WORDS = ("monk", "wool", "whale", "cotton", "stone", "river")
ASKS = ("Reverse the word {}.", "Spell out the word {}.", "Say it twice: {}.", "Sort the letters of {}.")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.9},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"eta": 0.2, "seed": 4},
    {"block_length": 4, "canvas": "growing"},
    {"guidance_scale": 0.5, "steps": 8},
    {"temperature": 1.0, "seed": 9, "stop": ["a", "e"]},
    {"approximate_cache": "prefix", "block_length": 8},
]
OPENAI = ("temperature", "seed", "top_p", "stop")


@contextlib.contextmanager
def server(model: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run the command, with one thread of torch, until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "unmask", "serve", model, "--port", str(port), "--queue", "1000"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/health").raise_for_status()
                break
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(60) == 0, "the server did not drain"


def chat_body(prompt: str, new: int, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    own = {name: value for name, value in settings.items() if name in OPENAI}
    extra = {name: value for name, value in settings.items() if name not in OPENAI}
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "max_tokens": new, "unmask": extra, **own, **more}


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], leave: bool = False
) -> tuple[str | None, list[float]]:
    """The answer, and when each piece of it came; None of a client that leaves after the first."""
    if not body.get("stream"):
        answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return answer["choices"][0]["message"]["content"], []
    text, times = "", []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if leave:
                return None, []
            if piece := json.loads(line[6:])["choices"][0]["delta"].get("content"):
                text += piece
                times.append(time.monotonic())
    return text, times


async def check_answers(url: str, model: Any, tokenizer: Any) -> None:
    asked = [
        (f"{ask.format(word)}{' Please.' * (n % 3)}", SETTINGS[(n + k) % 8])
        for n, word in enumerate(WORDS)
        for k, ask in enumerate(ASKS)
    ][:24]
    asked += [(text, SETTINGS[(n + 3) % 8]) for n, (text, _) in enumerate(asked[:8])]
    alone = [
        complete(model, tokenizer, [prompt_example(tokenizer, text)], max_new_tokens=16, **settings)[0].text
        for text, settings in asked
    ]
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:
        for leaving in (False, True):

            async def one(n: int, leaving: bool = leaving) -> str | None:
                await asyncio.sleep(n % 7 / 50)
                leave = leaving and n % 10 == 0
                body = chat_body(asked[n][0], 16, asked[n][1], stream=bool(n % 2) or leave)
                return (await ask(client, body, leave))[0]

            found = await asyncio.gather(*(one(n) for n in range(32)))
            stayed = [n for n in range(32) if found[n] is not None]
            same = sum(found[n] == alone[n] for n in stayed)
            print(f"answers equal to those alone: {same} of {len(stayed)}, {32 - len(stayed)} clients left")


async def check_speed(url: str, model: Any, tokenizer: Any, new: int, rounds: int) -> None:
    """Answers of a canvas whose tokens are committed one a step, so that each takes as many passes."""
    prompts = [ASKS[n % 4].format(WORDS[n % 6]) for n in range(8)]
    settings = {"min_new_tokens": new}
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def client_of(n: int, count: int) -> None:
            for _ in range(count):
                await ask(client, chat_body(prompts[n], new, settings))

        await asyncio.gather(*(client_of(n, 1) for n in range(8)))
        start = time.monotonic()
        for n in range(8):
            await client_of(n, 1)
        one_by_one = 8 * new / (time.monotonic() - start)
        start = time.monotonic()
        await asyncio.gather(*(client_of(n, rounds) for n in range(8)))
        together = 8 * rounds * new / (time.monotonic() - start)
    examples = [prompt_example(tokenizer, prompt) for prompt in prompts for _ in range(rounds)]
    complete(model, tokenizer, examples[:8], max_new_tokens=new, **settings)
    start = time.monotonic()
    complete(model, tokenizer, examples, batch_size=8, max_new_tokens=new, **settings)
    offline = 8 * rounds * new / (time.monotonic() - start)
    print(
        f"8 clients: {together:.0f} tokens/s; one after the other {one_by_one:.0f}: {together / one_by_one:.2f} times"
    )
    print(f"offline in batches of 8: {offline:.0f} tokens/s; the server has {together / offline:.2f} of it")


async def check_first(url: str, new: int) -> None:
    """With 8 clients at once, the share of an answer's time until its first content."""
    shares = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(n: int) -> None:
            for _ in range(3):
                start = time.monotonic()
                body = chat_body(
                    ASKS[n % 4].format(WORDS[n % 6]), new, {"block_length": new // 4, "min_new_tokens": new}
                )
                _, times = await ask(client, {**body, "stream": True})
                shares.append((times[0] - start) / (times[-1] - start))

        await asyncio.gather(*(one(n) for n in range(8)))
    print(
        f"first content after {statistics.median(shares):.2f} of the time (median), at most {max(shares):.2f}"
    )


async def misuse(url: str, process: psutil.Process, count: int) -> None:
    host, port = url.removeprefix("http://").split(":")
    draw = random.Random(0)
    codes: dict[int, int] = {}
    good = chat_body("Reverse the word monk.", 16, {"threshold": 0.9})
    hostile: list[Any] = [
        b"\xff\xfe",
        b"[" * 100_000,
        b"x" * 10 * 2**20,
        {**good, "max_tokens": 10**30},
        {**good, "n": -1},
        {**good, "messages": {}},
        {**good, "stop": [[]]},
        {"messages": [{"role": "user", "content": "<|mask|>" * 20}]},
        {**good, "unmask": {"policy": 3}},
        {**good, "logit_bias": {"-1": 5}},
        "slow",
        "half",
        "leave",
    ]
    async with httpx.AsyncClient(
        base_url=url, timeout=120, limits=httpx.Limits(max_connections=64)
    ) as client:
        expected = (await ask(client, good))[0]

        async def one(n: int) -> None:
            what = draw.choice(hostile) if n % 3 == 0 else good
            if what in ("slow", "half"):
                _, writer = await asyncio.open_connection(host, int(port))
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                data = json.dumps({**good, "stream": True}).encode()
                writer.write(
                    f"{head}Content-Length: {len(data)}\r\n\r\n".encode()
                    + (data if what == "slow" else data[:20])
                )
                await writer.drain()
                await asyncio.sleep(1)
                writer.close()
            elif what == "leave":
                await ask(client, {**good, "stream": True}, leave=True)
            elif what is good:
                assert (await ask(client, good))[0] == expected
            else:
                content = what if isinstance(what, bytes) else json.dumps(what).encode()
                answer = await client.post(
                    "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
                )
                codes[answer.status_code] = codes.get(answer.status_code, 0) + 1

        async def many(first: int, last: int) -> None:
            for start in range(first, last, 50):
                await asyncio.gather(*(one(n) for n in range(start, min(start + 50, last))))

        await many(0, count // 2)  # what a server takes once
        before = process.num_threads(), process.memory_info().rss
        await many(count // 2, count)
        await asyncio.sleep(1)
        after = process.num_threads(), process.memory_info().rss
        metrics = (await client.get("/metrics")).text
    running = [
        line for line in metrics.splitlines() if line.startswith(("unmask_running_rows", "unmask_queue"))
    ]
    print(f"{count} requests, hostile ones answered {codes}; {', '.join(running)}")
    print(
        f"threads {before[0]} -> {after[0]}, memory {before[1] >> 20} -> {after[1] >> 20} MiB in the second half"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="outputs/demo/final")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.model):
        print(f"{arguments.model} is not there: make demo")
        return
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    with server(arguments.model) as (url, process):
        asyncio.run(check_answers(url, model, tokenizer))
        asyncio.run(check_speed(url, model, tokenizer, arguments.new_tokens, arguments.rounds))
        asyncio.run(check_first(url, arguments.new_tokens))
        asyncio.run(misuse(url, process, arguments.requests))


if __name__ == "__main__":
    main()
