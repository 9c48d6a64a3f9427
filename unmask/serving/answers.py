"""Requests answered: what was asked is generated or scored, and sent whole or as it can no longer change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from unmask.generation.rows import Event
from unmask.generation.trace import token_texts
from unmask.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    RequestError,
    ScoreRequest,
    read_request,
)
from unmask.serving.rows import Row, Served, chat_prompt, gap_row, rows, score_examples, text_prompt
from unmask.serving.scheduler import Job
from unmask.serving.scoring import TokenScore, bounds, left_to_right
from unmask.serving.shapes import Answer, ChatShape, Shape, offers_tools
from unmask.serving.text import CALL, TextStream

if TYPE_CHECKING:
    from unmask.data.encode import Example
    from unmask.serving.app import Call, Server


def _check_request(request: Any) -> None:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options has no effect without stream.", "stream_options")
    if request.unmask.drafts and not request.stream:
        raise RequestError("unmask.drafts has no effect without stream.", "unmask.drafts")


def _prepare_chat(server: Server, body: bytes) -> tuple[ChatRequest, Served, list[Row], list[str]]:
    request: ChatRequest = read_request(ChatRequest, body)
    served = server.find(request.model)
    _check_request(request)
    for name in ("max_completion_tokens", "max_tokens"):
        if getattr(request, name) == 0:
            raise RequestError(f"{name} must be at least 1; got 0.", name)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise RequestError("max_tokens and max_completion_tokens differ; give one.", "max_tokens")
        request.max_tokens = request.max_completion_tokens
    prompt = chat_prompt(served, request.messages, request.tools if offers_tools(request) else None)
    return request, served, rows(served, request, [prompt]), [""]


def _prepare_text(server: Server, body: bytes) -> tuple[CompletionRequest, Served, list[Row], list[str]]:
    request: CompletionRequest = read_request(CompletionRequest, body)
    served = server.find(request.model)
    _check_request(request)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 without echo; got 0.", "max_tokens")
    for name, refused, why in (
        ("echo", request.echo and request.suffix is not None, "does not go with suffix"),
        ("stop", request.stop and request.suffix is not None, "has no effect with suffix: the gap is filled"),
        (
            "echo",
            request.echo and request.stream and request.logprobs is not None,
            "with logprobs is not streamed",
        ),
    ):
        if refused:
            raise RequestError(f"{name} {why}.", name)
    prompts = [text_prompt(served, prompt) for prompt in request.prompt]
    before = [""] * len(prompts)
    if request.echo:
        before = [
            prompt if isinstance(prompt, str) else str(served.tokenizer.decode(prompt))
            for prompt in request.prompt
        ]
    new = request.max_tokens
    request.max_tokens = 1 if new == 0 else new  # the other settings are checked either way
    made = rows(served, request, prompts, request.suffix)
    request.max_tokens = new
    return request, served, made, before


async def chat(call: Call) -> None:
    """Answer /v1/chat/completions."""
    request, served, todo, before = await call.server.encoded(_prepare_chat, call.server, call.body)
    await _generate(call, ChatShape(call, served, request), todo, before)


async def completions(call: Call) -> None:
    """Answer /v1/completions."""
    request, served, todo, before = await call.server.encoded(_prepare_text, call.server, call.body)
    await _generate(call, Shape(call, served, request), todo, before)


async def _generate(call: Call, shape: Shape, todo: Sequence[Row], before: Sequence[str]) -> None:
    request, served = shape.request, shape.served
    call.within(request.unmask.timeout)
    if request.logprobs not in (None, False) or request.unmask.drafts:
        for row in todo:
            row.settings["return_trace"] = True
    count = request.n or 1  # answers to each prompt
    markers = [CALL] if offers_tools(request) else []
    streams = [TextStream(served.tokenizer, request.stop or [], served.end_ids, markers) for _ in todo]
    jobs = [Job(served, row, row.tokens, each=bool(request.stream)) for row in todo]
    usage = Usage(sum(row.prompt_tokens for row in todo[::count]))
    if request.stream:
        await _stream(call, shape, jobs, streams, usage, [before[i // count] for i in range(len(todo))])
    else:
        of_prompt = [row.prompt.input_ids for row in todo[::count]]
        scores: list[list[TokenScore]] = [[] for _ in of_prompt]
        answers = [Answer("", [], 0, 0, "length") for _ in todo]
        if request.max_tokens == 0:
            jobs = []
        generated = len(jobs)
        if getattr(request, "echo", None) and request.logprobs is not None:
            jobs += [Job(served, partial(_score_prompt, ids), 0) for ids in of_prompt]
        async for index, found in call.run(jobs):
            if index >= generated:
                scores[index - generated] = found
            else:
                answers[index] = finished(streams[index], served, found.answer)
                usage.add(answers[index])
        choices = [
            shape.choice(index, answer, before[index // count], scores[index // count])
            for index, answer in enumerate(answers)
        ]
        await call.json(shape.object(choices, usage=usage.object()))
    usage.count(call.server)


def _score_prompt(ids: list[int], model: Any, pause: Callable[[], None]) -> list[TokenScore]:
    return left_to_right(model, ids, pause)


async def _stream(
    call: Call,
    shape: Shape,
    jobs: Sequence[Job],
    streams: Sequence[TextStream],
    usage: Usage,
    before: Sequence[str],
) -> None:
    """Send what is final as it becomes final."""
    request, served = shape.request, shape.served
    mask = served.model.config.mask_token_id
    canvases = [Canvas([None] * job.work.new_tokens, mask) for job in jobs if isinstance(job.work, Row)]
    has_content = False

    async def chunk(choice: Any, **more: Any) -> None:
        await call.event(shape.object([choice] if choice else [], chunk=True, **more))

    async for index, event in call.run(jobs):
        canvas, stream = canvases[index], streams[index]
        if not canvas.steps:
            if (opening := shape.first(index)) is not None:
                await chunk(opening)
            if before[index]:
                await chunk(shape.delta(index, before[index]))
        text = stream.push(canvas.final) if canvas.take(event) else ""
        drafts = {"unmask": canvas.draft(served)} if request.unmask.drafts else {}
        if text or drafts:
            await chunk(shape.delta(index, text), **drafts)
        if text and not has_content:
            has_content = True
            call.server.metrics.observe("unmask_first_content_seconds", call.seconds_so_far)
        if event.done:
            answer = finished(stream, served, event.answer)
            usage.add(answer)
            *parts, ends = shape.last(index, stream, answer)
            for part in parts:
                await chunk(part)
            await chunk(ends, **({"unmask": canvas.whole(served, event.answer)} if drafts else {}))
    if request.stream_options is not None and request.stream_options.include_usage:
        await chunk(None, usage=usage.object())
    await call.event(None)


# Scores and gaps.


def _prepare_score(server: Server, body: bytes) -> tuple[ScoreRequest, Served, list[Example]]:
    request: ScoreRequest = read_request(ScoreRequest, body)
    served = server.find(request.model)
    return request, served, score_examples(served, request)


async def score(call: Call) -> None:
    """Answer /v1/score: a bound on -log p, its standard error, and what each token contributes, in nats."""
    request, served, examples = await call.server.encoded(_prepare_score, call.server, call.body)
    settings = {"estimator": request.estimator, "num_samples": request.samples, "seed": request.seed}
    job = Job(served, lambda model, pause: bounds(model, examples, pause, **settings), 0)
    async for _, found in call.run([job]):
        mean, perplexity = found.nats_per_token(), found.perplexity()
        scores = []
        for row, example in enumerate(examples):
            is_scored = [not given for given in example.src_mask]
            ids, nats = (
                list(compress(one, is_scored)) for one in (example.input_ids, found.token_nll[row].tolist())
            )
            texts = [str(served.tokenizer.decode([token])) for token in ids]
            scores.append(
                {
                    "nats": found.nll[row].item(),
                    "stderr": found.stderr[row].item(),
                    "tokens": len(ids),
                    "nats_per_token": mean.value[row].item(),
                    "perplexity": perplexity.value[row].item(),
                    "token_nats": [list(pair) for pair in zip(texts, nats, strict=True)],
                }
            )
        usage = {"sequences": found.num_forwards}
        await call.json({"object": "score", "model": served.name, "scores": scores, "usage": usage})


def _prepare_infill(server: Server, body: bytes) -> tuple[InfillRequest, Served, Row, list[int | None]]:
    request: InfillRequest = read_request(InfillRequest, body)
    served = server.find(request.model)
    _check_request(request)
    row, canvas = gap_row(served, request)
    row.settings["return_trace"] = True
    return request, served, row, canvas


async def infill(call: Call) -> None:
    """Answer /v1/infill: the whole text; with `stream` also the canvas after each forward pass."""
    request, served, row, tokens = await call.server.encoded(_prepare_infill, call.server, call.body)
    call.within(request.unmask.timeout)
    canvas = Canvas(tokens, served.model.config.mask_token_id)
    usage = Usage(row.prompt_tokens)
    async for _, event in call.run([Job(served, row, row.tokens, each=bool(request.stream))]):
        canvas.take(event)
        if event.answer is None:
            await call.event({"object": "infill.chunk", "unmask": canvas.draft(served)})
            continue
        if not request.stream:  # the last event alone was told
            canvas.fill(event.answer)
        usage.add(Answer("", [], len(event.answer.ids), event.answer.num_forwards, "stop"))
        text = str(served.tokenizer.decode(canvas.ids))
        ends = {
            "object": "infill",
            "model": served.name,
            "text": text,
            "unmask": canvas.whole(served, event.answer),
        }
        await (call.event if request.stream else call.json)({**ends, "usage": usage.object()})
    if request.stream:
        await call.event(None)
    usage.count(call.server)


class Canvas:
    """The canvas of a row, by its events.

    Args:
        tokens: None = to fill; the events of the row count these positions alone.
        mask_token_id: what is not filled yet.
    """

    def __init__(self, tokens: Sequence[int | None], mask_token_id: int):
        self.given, self.mask_token_id = list(tokens), mask_token_id
        self.gaps = [position for position, token in enumerate(tokens) if token is None]
        self.filled = [mask_token_id] * len(self.gaps)
        self.new: list[int] = []  # positions committed in the last forward pass
        self.confidence: dict[int, float] = {}  # the model's probability of committed tokens
        self.num_final = self.steps = 0

    @property
    def ids(self) -> list[int]:
        """The tokens, masks among them."""
        filled = iter(self.filled)
        return [next(filled) if token is None else token for token in self.given]

    @property
    def final(self) -> list[int]:
        """The tokens that can no longer change, from the first on."""
        return self.filled[: self.num_final]

    def take(self, event: Event) -> bool:
        """Note what a forward pass did; whether more is final."""
        self.steps += 1
        event.apply(self.filled, self.mask_token_id)
        self.new = [self.gaps[position] for position in event.positions]
        self.confidence |= zip(self.new, event.confidence, strict=False)
        more, self.num_final = event.num_final > self.num_final, max(self.num_final, event.num_final)
        return more

    def fill(self, answer: Any) -> None:
        """Take the tokens of a finished answer."""
        self.filled[: len(answer.ids)] = answer.ids
        self.confidence |= zip(self.gaps, answer.confidence, strict=False)

    def draft(self, served: Served) -> dict[str, Any]:
        """The canvas as it stands: texts, null = masked; their probability when committed, and what is new."""
        ids, mask = self.ids, self.mask_token_id
        texts = [
            None if id == mask else text
            for id, text in zip(ids, token_texts(ids, served.tokenizer), strict=True)
        ]
        confidence = [round(self.confidence.get(position, 0.0), 4) for position in range(len(texts))]
        shown = {"canvas": texts, "confidence": confidence, "new": self.new}
        return {**shown, "num_final": self.num_final, "forward_passes": self.steps}

    def whole(self, served: Served, answer: Any) -> dict[str, Any]:
        """The finished canvas, with what is known of the answer's tokens."""
        return {
            **self.draft(served),
            "ids": answer.ids,
            "canvas_ids": [None if token == self.mask_token_id else token for token in self.ids],
            "commit_step": answer.commit_step,
            "forward_passes": answer.num_forwards,
        }


class Usage:
    """Tokens and forward passes of a request."""

    def __init__(self, prompt: int):
        self.prompt, self.completion, self.forwards = prompt, 0, 0

    def add(self, answer: Answer) -> None:
        """Add an answer."""
        self.completion += answer.num_tokens
        self.forwards += answer.num_forwards

    def object(self) -> dict[str, int]:
        """What the response says."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "forward_passes": self.forwards,
        }

    def count(self, server: Server) -> None:
        """Add it to the metrics."""
        server.metrics.add("unmask_prompt_tokens_total", self.prompt)
        server.metrics.add("unmask_completion_tokens_total", self.completion)


def finished(stream: TextStream, served: Served, answer: Any) -> Answer:
    """Cut an engine's answer at a stop string, and say why it ended."""
    text, ended = stream.text(answer.ids), bool(answer.ids) and answer.ids[-1] in served.end_ids
    ids = answer.ids[: len(answer.ids) - ended]
    cut = stream.stop.strings and text != str(served.tokenizer.decode(ids, skip_special_tokens=True))
    shown = ids
    while cut and shown and len(str(served.tokenizer.decode(shown, skip_special_tokens=True))) > len(text):
        shown = shown[:-1]
    shown = shown if cut else answer.ids
    tokens = list(zip(shown, answer.confidence, strict=False))
    return Answer(text, tokens, len(answer.ids), answer.num_forwards, "stop" if ended or cut else "length")
