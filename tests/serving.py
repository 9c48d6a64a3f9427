"""A server on 127.0.0.1 for the tests, and a model whose answers are known: `from serving import served_by`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn

from unmask.data.tokenizer import byte_tokenizer
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.rows import Answer, Event
from unmask.serving.app import Server, make_app
from unmask.serving.rows import Served
from unmask.serving.scheduler import Scheduler

END = 258


@dataclass
class FakeEngine:
    """Answers a prompt with its last words in capital letters, a token a pass, from left to right.

    A prompt with "fail" in it fails at its second pass; one with "explode" takes the whole engine down.
    """

    model: FakeModel
    rows: dict[int, SimpleNamespace] = field(default_factory=dict)
    slots: int = 0

    def add(self, input_ids: list[int], src_mask: Any = None, **settings: Any) -> int:
        said = bytes(i for i in input_ids if i < 256)
        for before, after in ((b"user\n", b"\nassistant\n"), (b"\n", b"")):
            said = said.rpartition(before)[2].removesuffix(after)
        answer = [*said.upper(), END][
            : settings.get("max_new_tokens", self.model.generation_config.max_new_tokens)
        ]
        self.slots += 1
        self.rows[self.slots] = SimpleNamespace(
            said=said, answer=answer, done=0, prompt=list(input_ids), stop=settings.get("stopping_criteria")
        )
        self.model.added.append(settings)
        return self.slots

    def drop(self, slot: int) -> None:
        self.model.dropped.append(self.rows.pop(slot).said)

    def step(self) -> list[Event]:
        self.model.gate.wait()
        self.model.passes.append([row.said for row in self.rows.values()])
        return [self._event(slot, row) for slot, row in list(self.rows.items())]

    def _event(self, slot: int, row: SimpleNamespace) -> Event:
        if b"explode" in row.said:
            raise RuntimeError("the engine is gone")
        token, row.done = row.answer[row.done], row.done + 1
        ids = torch.tensor([[*row.prompt, *row.answer[: row.done]]])
        stopped = row.stop is not None and bool(row.stop(ids, None, prompt_length=len(row.prompt)))
        answer = error = None
        if b"fail" in row.said and row.done == 2:
            error = RuntimeError("no such luck")
        elif stopped or row.done == len(row.answer):
            count = row.done
            answer = Answer(row.answer[:count], list(range(count)), count, [0.5] * count, [0.0] * count)
        if answer or error:
            del self.rows[slot]
        return Event(
            slot,
            positions=[row.done - 1],
            tokens=[token],
            confidence=[0.5],
            num_final=row.done,
            answer=answer,
            error=error,
        )


class FakeModel:
    """A model of bytes that has engines; `gate` holds its forward passes back while it is not set."""

    def __init__(self, positions: int = 4096, max_new_tokens: int = 64):
        self.config = SimpleNamespace(
            max_position_embeddings=positions, vocab_size=260, mask_token_id=259, eos_token_id=END
        )
        self.generation_config = DiffusionGenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=END)
        self.gate = threading.Event()
        self.gate.set()
        self.added: list[dict[str, Any]] = []  # settings
        self.dropped: list[bytes] = []
        self.passes: list[list[bytes]] = []  # what ran together
        self.engines: list[FakeEngine] = []

    def make_engine(self, max_rows: int = 64) -> FakeEngine:
        self.engines.append(FakeEngine(self))
        return self.engines[-1]


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    model: Any
    scheduler: Scheduler
    server: Server
    uvicorn: uvicorn.Server


@contextmanager
def served_by(
    model: Any, *, api_key: str | None = None, name: str = "m", **options: Any
) -> Iterator[Running]:
    """Serve a model of `byte_tokenizer` in a thread; `options` are the scheduler's."""
    served = Served(
        name, model, byte_tokenizer(), DiffusionGenerationConfig.from_generic(model.generation_config)
    )
    with running([served], api_key=api_key, **options) as server:
        yield server


@contextmanager
def running(models: list[Served], *, api_key: str | None = None, **options: Any) -> Iterator[Running]:
    """Serve models in a thread until the block ends."""
    scheduler = Scheduler(**options)
    server = Server(models, scheduler, api_key)
    config = uvicorn.Config(make_app(server), port=0, log_level="warning", server_header=False)
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    try:
        while not uvicorn_server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", models[0].model, scheduler, server, uvicorn_server)
    finally:
        getattr(models[0].model, "gate", threading.Event()).set()
        uvicorn_server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not scheduler.thread.is_alive()
