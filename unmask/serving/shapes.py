"""The fields of OpenAI's responses: answers whole, or in the chunks of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unmask.serving.rows import Served
from unmask.serving.scoring import TokenScore
from unmask.serving.text import TextStream, split_calls

if TYPE_CHECKING:
    from unmask.serving.app import Call

_LEAST = 1e-45  # a probability that has a logarithm


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str  # up to a stop string, without special tokens
    # Of this text, and the end token, with the model's probability when each was committed.
    tokens: list[tuple[int, float]]
    num_tokens: int  # the end token and what a stop string cut off included
    num_forwards: int
    reason: str  # "stop" or "length"


def model_object(served: Served) -> dict[str, Any]:
    """What /v1/models says of a model."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "unmask",
        "max_model_len": served.positions,
        "max_new_tokens": served.config.max_new_tokens,  # the canvas of a request that says nothing
    }


class Shape:
    """The fields of /v1/completions, as one object and as chunks."""

    kinds = ("text_completion", "text_completion")

    def __init__(self, call: Call, served: Served, request: Any):
        self.call, self.served, self.request = call, served, request

    def object(self, choices: Sequence[Any], chunk: bool = False, **more: Any) -> dict[str, Any]:
        """The object around choices."""
        call = self.call
        head = {
            "id": call.identity,
            "object": self.kinds[chunk],
            "created": call.created,
            "model": self.served.name,
        }
        return {**head, "choices": list(choices), **more}

    def choice(
        self, index: int, answer: Answer, before: str = "", scores: Sequence[TokenScore] = ()
    ) -> dict[str, Any]:
        """A finished choice; `before` is the prompt, if it is to be repeated, with its scores."""
        logprobs = None if self.request.logprobs is None else self.logprobs(answer.tokens, before, scores)
        text = before + answer.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.reason}

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk that a stream begins with."""
        return None

    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk with a piece of text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def last(self, index: int, stream: TextStream, answer: Answer) -> list[dict[str, Any]]:
        """The choices of the chunks that an answer ends with."""
        logprobs = None if self.request.logprobs is None else self.logprobs(answer.tokens)
        ends = {"index": index, "text": stream.finish(answer.text), "logprobs": logprobs}
        return [{**ends, "finish_reason": answer.reason}]

    def logprobs(
        self, tokens: Iterable[tuple[int, float]], before: str = "", scores: Sequence[TokenScore] = ()
    ) -> dict[str, Any]:
        """Log-probabilities: of a repeated prompt's tokens, each given all before it, and of new ones.

        The likeliest token is known of the prompt alone.
        """
        table: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        offset = 0
        found = [(one.token, one.logprob, {one.best: one.best_logprob}) for one in scores]
        found += [(token, math.log(max(probability, _LEAST)), {}) for token, probability in tokens]
        for number, (token, logprob, best) in enumerate(found):
            if number == len(scores):
                offset = len(before)
            text = self.token_text(token)
            top = {text: logprob} | {self.token_text(other): value for other, value in best.items()}
            for name, value in zip(table, (text, logprob, top, offset), strict=True):
                table[name].append(value)
            offset += len(text)
        return table

    def token_text(self, token: int) -> str:
        """A token as text."""
        return str(self.served.tokenizer.decode([token]))


class ChatShape(Shape):
    """The fields of /v1/chat/completions."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def choice(
        self, index: int, answer: Answer, before: str = "", scores: Sequence[TokenScore] = ()
    ) -> dict[str, Any]:
        """A finished choice."""
        text, calls, reason = self._called(answer)
        message = {"role": "assistant", "content": text.strip() or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(answer),
            "finish_reason": reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of the chunk that a stream begins with."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice of a chunk with a piece of text."""
        return self._delta(index, {"content": text} if text else {})

    def last(self, index: int, stream: TextStream, answer: Answer) -> list[dict[str, Any]]:
        """The choices of the chunks that an answer ends with."""
        text, calls, reason = self._called(answer)
        rest = stream.finish(text)
        parts: list[dict[str, Any]] = [{"content": rest}] if rest else []
        if calls:
            parts.append({"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]})
        ends = {**self._delta(index, {}), "finish_reason": reason}
        if self.request.logprobs:
            ends["logprobs"] = self._content(answer)
        return [*(self._delta(index, part) for part in parts), ends]

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _called(self, answer: Answer) -> tuple[str, list[dict[str, Any]], str]:
        """Text and tool calls, if tools were offered, and why the answer ended."""
        text, calls = split_calls(answer.text) if offers_tools(self.request) else (answer.text, [])
        named = [
            {
                "id": f"call_{self.call.identity[-12:]}_{number}",
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for number, call in enumerate(calls)
        ]
        return text, named, "tool_calls" if calls else answer.reason

    def _content(self, answer: Answer) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        content = []
        for token, probability in answer.tokens:
            if token in self.served.end_ids:
                continue
            text = self.token_text(token)
            of_bytes = None if "\ufffd" in text else list(text.encode())
            logprob = math.log(max(probability, _LEAST))
            content.append({"token": text, "logprob": logprob, "bytes": of_bytes, "top_logprobs": []})
        return {"content": content, "refusal": None}


def offers_tools(request: Any) -> bool:
    """Whether the model may call tools."""
    return bool(getattr(request, "tools", None)) and request.tool_choice != "none"
