"""Checked requests -> rows for the engine, and texts to score.

What a request does not say has the default of the model it names.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example
from unmask.data.records import MESSAGE, Conversation, RecordError, check_text, to_conversation
from unmask.data.template import NO_REASONING, DropRecord
from unmask.data.tokenizer import ids_without_token
from unmask.diffusion.likelihood import ESTIMATORS
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.infill import Gap, parse_gaps
from unmask.generation.prompts import chat_encoder, following_ids, raw_example
from unmask.generation.text import StopStrings
from unmask.serving.protocol import MOST_ANSWERS, GenerationRequest, InfillRequest, RequestError, ScoreRequest

# Fields of OpenAI's messages that say nothing to a model of text.
IGNORED_IN_MESSAGES = ("refusal", "annotations", "audio")
_MIDDLE = Example([0], [False])  # what a text in the middle of another follows


@dataclass(frozen=True)
class Served:
    """A model that requests can name."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: DiffusionGenerationConfig  # its defaults
    adapter: str | None = None  # the name of LoRA adapters that share the model's weights
    created: int = 0
    encoder: Encoder | None = field(init=False)
    unused: list[int] = field(init=False)  # ids without a token
    end_ids: list[int] = field(init=False)
    thread_tokenizer: PreTrainedTokenizerBase = field(init=False)  # a copy for the thread of the models

    def __post_init__(self) -> None:
        encoder = chat_encoder(self.tokenizer) if self.tokenizer.chat_template else None
        ends = (
            self.config.eos_token_ids
            or DiffusionGenerationConfig.from_model_config(self.model.config).eos_token_ids
        )
        own = {
            "encoder": encoder,
            "unused": ids_without_token(self.tokenizer, self.vocab_size),
            "end_ids": ends,
        }
        own["thread_tokenizer"] = copy.deepcopy(self.tokenizer)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def positions(self) -> int:
        """Tokens of a sequence at most."""
        return self.model.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model.config.vocab_size


@dataclass(frozen=True)
class Row:
    """One answer to generate, or with `is_gap` the gaps of `prompt` to fill."""

    prompt: Example
    settings: dict[str, Any]  # fields of `DiffusionGenerationConfig`
    new_tokens: int  # length of the canvas
    is_gap: list[bool] | None = None
    stop: StopStrings | None = None
    logit_bias: dict[int, float] | None = None
    guided: bool = False

    def add(self, engine: Any) -> int:
        """Add it to an engine; returns its slot."""
        more = {"stopping_criteria": self.stop, "logit_bias": self.logit_bias, "is_gap": self.is_gap}
        if self.is_gap is None:
            more["src_mask"] = self.prompt.src_mask
        given = {name: value for name, value in more.items() if value is not None}
        return engine.add(self.prompt.input_ids, **given, **self.settings)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are given."""
        return len(self.prompt.input_ids) - sum(self.is_gap or ())

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes."""
        new = self.new_tokens if self.is_gap is None else 0
        return (len(self.prompt.input_ids) + new) * (1 + self.guided)


def conversation(messages: list[Any], tools: list[Any] | None, *, answered: bool = False) -> Conversation:
    """Read messages of OpenAI's form; `answered`: the last turn is an assistant's."""
    kept = [
        {key: value for key, value in message.items() if key not in IGNORED_IN_MESSAGES}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
    record: dict[str, Any] = {"messages": kept, **({"tools": tools} if tools else {})}
    try:
        read = to_conversation(record, "messages", where="messages", answered=answered)
    except RecordError as error:
        reason = f"{error.reason}{error.detail}"
        place = error.where.removeprefix("messages, ")
        raise RequestError(
            f"{place}: {reason}.", "tools" if "tools" in error.where else "messages"
        ) from error
    if read.unused:
        name = read.unused[0].removeprefix("messages.")[:80]
        known = [key for keys in MESSAGE.values() for key in keys]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        raise RequestError(f"messages: unknown field {name!r}; {hint}", "messages", code="unknown_field")
    is_answer = read.turns[-1].role == "assistant"
    if answered and not is_answer:
        raise RequestError("messages: the last one must be an assistant's, which is scored.", "messages")
    if is_answer and not answered:
        raise RequestError("messages: the last one is an assistant's; ask something after it.", "messages")
    return read


def chat_prompt(served: Served, messages: list[Any], tools: list[Any] | None) -> Example:
    """The prompt that training would show for these messages."""
    encoder = _encoder(served)
    read = conversation(messages, tools)
    trained = [turn.role == "assistant" for turn in read.turns]
    rendered = encoder.layout.render_prompt(read.turns, trained, "messages", read.tools)
    _refuse_lost(rendered.lost)
    [(ids, source)] = encoder.tokenize([rendered])
    return Example(ids, source)


def _refuse_lost(lost: Sequence[str]) -> None:
    for note in lost:
        if note != NO_REASONING:  # which templates leave out of earlier turns on purpose
            param = "tools" if "tools" in note else "messages"
            raise RequestError(f"{param}: not with this model: {note}.", param)


def _encoder(served: Served) -> Encoder:
    if served.encoder is None:
        raise RequestError(f"{served.name} has no chat template; use /v1/completions.", "messages")
    return served.encoder


def text_prompt(served: Served, prompt: str | list[int], param: str = "prompt") -> Example:
    """The beginning of a plain text, or ids as they are."""
    if isinstance(prompt, str):
        return raw_example(served.tokenizer, _checked(prompt, param))
    if outside := [token for token in prompt if not 0 <= token < served.vocab_size]:
        raise RequestError(f"{param}: ids must be in [0, {served.vocab_size}); got {outside[0]}.", param)
    return Example(list(prompt), [False] * len(prompt))


def _checked(text: str, param: str) -> str:
    try:
        return check_text(text, param, "the request")
    except RecordError as error:
        raise RequestError(f"{param}: {error.reason}{error.detail}.", param) from error


def rows(
    served: Served, request: GenerationRequest, prompts: Sequence[Example], suffix: str | None = None
) -> list[Row]:
    """The answers that a request asks for, `n` to each prompt, drawn from seed, seed + 1, ...

    With a suffix they are what comes between the prompt and it.

    Raises:
        RequestError: a setting cannot be used, or a prompt and its canvas are too long.
    """
    count = request.n or 1
    if len(prompts) * count > MOST_ANSWERS:
        raise RequestError(
            f"a request has at most {MOST_ANSWERS} answers; got {len(prompts)} prompts and n = {count}.", "n"
        )
    strings = [_checked(one, "stop") for one in request.stop or []]
    stop = StopStrings(served.thread_tokenizer, strings) if strings else None
    config, settings = checked_settings(served, request.settings())
    bias = request.logit_bias
    if bias and max(bias) >= served.vocab_size:
        raise RequestError(
            f"logit_bias: ids must be below {served.vocab_size}; got {max(bias)}.", "logit_bias"
        )
    new, is_gap = config.max_new_tokens, None
    after = [] if suffix is None else following_ids(_MIDDLE, _checked(suffix, "suffix"), served.tokenizer)
    for prompt in prompts:
        check_length(served, len(prompt.input_ids) + len(after), new)
    seed, highest = cast(int, config.seed), 2**63 - 1
    if seed + count - 1 > highest:
        raise RequestError(f"seed must be at most {highest - count + 1} with n = {count}.", "seed")
    guided, made = bool(config.guidance_scale), []
    for prompt in prompts:
        if suffix is not None:
            ids = prompt.input_ids + [0] * new + after
            is_gap = [len(prompt.input_ids) <= i < len(prompt.input_ids) + new for i in range(len(ids))]
            prompt = Example(ids, [True] * len(ids))
        made += [
            Row(prompt, {**settings, "seed": seed + i}, new, is_gap, stop, bias or None, guided)
            for i in range(count)
        ]
    return made


def checked_settings(
    served: Served, given: Mapping[str, Any]
) -> tuple[DiffusionGenerationConfig, dict[str, Any]]:
    """The config that these settings make of the model's defaults; and the settings to run with."""
    try:
        config = served.config.updated(None, **given)
    except UnmaskError as error:
        said = str(error)
        raise RequestError(said, next((name for name in given if name in said), None)) from error
    return config, {"unused_tokens": served.unused, **given}


def check_length(served: Served, prompt: int, new: int) -> None:
    """Refuse a prompt that leaves no room for its canvas."""
    if prompt + new > served.positions:
        raise RequestError(
            f"a prompt of {prompt} tokens and {new} new ones need more than the model's {served.positions}"
            " positions; shorten the prompt or lower max_tokens.",
            "max_tokens",
            code="context_length_exceeded",
        )


def score_examples(served: Served, request: ScoreRequest) -> list[Example]:
    """What `/v1/score` scores: src_mask True = given."""
    if request.estimator not in ESTIMATORS:
        raise RequestError(f"estimator must be one of {', '.join(ESTIMATORS)}.", "estimator")
    if (request.messages is None) == (request.text is None):
        raise RequestError("give messages, of which the last is scored, or text, one of them.", "text")
    if request.messages is not None:
        if request.prompt is not None:
            raise RequestError("prompt has no effect with messages; remove it.", "prompt")
        read, encoder = conversation(request.messages, request.tools, answered=True), _encoder(served)
        trained = [False] * (len(read.turns) - 1) + [True]
        try:
            rendered = encoder.layout.render(read.turns, trained, "messages", read.tools)
        except DropRecord as error:
            raise RequestError(f"messages: {error}.", "messages") from error
        _refuse_lost(rendered.lost)
        del rendered.pieces[-1]  # what follows the end token
        [(ids, source)] = encoder.tokenize([rendered])
        fill = -source.count(False) % request.end_fill  # as data.sft.end_fill in training
        examples = [Example(ids + [encoder.end_token_id] * fill, source + [False] * fill)]
    else:
        if request.end_fill != 1:
            raise RequestError("end_fill has no effect with text; remove it.", "end_fill")
        texts = request.text or []
        prompts = request.prompt or [""]
        if len(prompts) not in (1, len(texts)):
            raise RequestError(f"prompt must be one, or one for each of the {len(texts)} texts.", "prompt")
        if len(prompts) == 1:
            prompts = prompts * len(texts)
        examples = []
        for prompt, text in zip(prompts, texts, strict=True):
            before = text_prompt(served, prompt) if prompt else Example([], [])
            ids = text_prompt(served, text, "text").input_ids
            if isinstance(text, str) and before.input_ids:
                ids = following_ids(before, text, served.tokenizer)
            source = [True] * len(before.input_ids) + [False] * len(ids)
            examples.append(Example(before.input_ids + ids, source))
    for example in examples:
        check_length(served, len(example.input_ids), 0)
    if len(examples) > MOST_ANSWERS:
        raise RequestError(f"text: at most {MOST_ANSWERS} texts; got {len(examples)}.", "text")
    return examples


def gap_row(served: Served, request: InfillRequest) -> tuple[Row, list[int | None]]:
    """The row that `/v1/infill` asks for, and its canvas (None = to fill)."""
    if (request.text is None) == (request.canvas is None):
        raise RequestError("give text with gaps, or canvas with messages, one of them.", "text")
    before = Example([], [])
    if request.messages is not None:
        before = chat_prompt(served, request.messages, None)
    canvas = list(request.canvas or [])
    if request.text is not None:
        if request.messages is not None:
            raise RequestError("messages have no effect with text; remove them.", "messages")
        for part in _gap_parts(request.text):
            if isinstance(part, Gap):
                canvas += [None] * part.low
            else:
                canvas += following_ids(_MIDDLE if canvas else before, part, served.tokenizer)
    if outside := [token for token in canvas if token is not None and token >= served.vocab_size]:
        raise RequestError(f"canvas: ids must be below {served.vocab_size}; got {outside[0]}.", "canvas")
    if None not in canvas:
        raise RequestError(
            "there is nothing to fill: write a gap as [[gap:5]], or null in the canvas.", "canvas"
        )
    config, settings = checked_settings(served, {**request.settings(), "max_new_tokens": len(canvas)})
    check_length(served, len(before.input_ids), len(canvas))
    ids = before.input_ids + [0 if token is None else token for token in canvas]
    is_gap = [False] * len(before.input_ids) + [token is None for token in canvas]
    whole = Example(ids, [True] * len(ids))
    row = Row(whole, settings, canvas.count(None), is_gap, guided=bool(config.guidance_scale))
    return row, canvas


def _gap_parts(text: str) -> list[str | Gap]:
    try:
        parts = parse_gaps(_checked(text, "text"))
    except UnmaskError as error:
        raise RequestError(str(error), "text") from error
    for part in parts:
        if isinstance(part, Gap) and part.low < part.high:
            raise RequestError(
                "a gap has one length here, such as [[gap:5]]; `unmask infill` tries several.", "text"
            )
    return parts
