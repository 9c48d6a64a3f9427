"""The fields of requests, OpenAI's and ours, each of them checked.

What is not given has the checkpoint's default. `unmask` has the settings of `DiffusionGenerationConfig` that
OpenAI's fields do not name.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig

MOST_ANSWERS = 128  # of a request: prompts times n
MOST_STOPS = 16
MOST_SAMPLES = 1024  # draws of /v1/score
MOST_END_FILL = 65536
LONGEST_STOP = 256  # characters
LONGEST_REQUEST = 3600.0  # seconds
EXTRA = (  # settings under `unmask`
    *("policy", "alg_temp", "threshold", "factor", "entropy_bound", "eta", "steps", "block_length"),
    *("sub_block_length", "first_token_alone", "defer_end", "canvas", "guidance_scale", "top_k"),
    *("min_new_tokens", "approximate_cache", "refresh_interval"),
)


class RequestError(UnmaskError):
    """A request that is refused: a status of HTTP, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """What OpenAI's clients read."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# Fields.


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if len(value) > MOST_STOPS or max(map(len, value), default=0) > LONGEST_STOP:
        raise ValueError(f"must be at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value) and bool(value)


def _prompts(value: Any) -> Any:
    """One prompt or several, each a text or a list of ids -> several."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _is_ids(one) for one in value):
        return value
    raise ValueError("must be a text, a list of token ids, or a list of these; an empty list is none")


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids with numbers from -100 to 100")
    bias = {}
    for token, amount in value.items():
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if (
            not token.isascii()
            or not token.isdigit()
            or len(token) > 9
            or not is_number
            or not -100 <= amount <= 100
        ):
            raise ValueError("must be an object of token ids with numbers from -100 to 100")
        bias[int(token)] = float(amount)
    return bias


def _only(*values: Any, why: str) -> BeforeValidator:
    """Let a field of OpenAI's have the values that change nothing here."""

    def check(value: Any) -> Any:
        if value is not None and not any(value == one and type(value) is type(one) for one in values):
            raise ValueError(why)
        return value

    return BeforeValidator(check)


_NO_PENALTY = _only(0, 0.0, why="is not supported: leave it out or 0")
_FORMAT = (
    "only {'type': 'text'} is supported: a canvas is filled in any order, which a JSON schema does not constrain"
    " yet; say the format in the prompt"
)


def _format(value: Any) -> Any:
    if value is not None and value != {"type": "text"}:
        raise ValueError(_FORMAT)
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


_kinds = {**DiffusionGenerationConfig.__annotations__, "policy": str}
_extra_fields: Any = {name: (_kinds[name] | None, None) for name in EXTRA}
Extra: Any = create_model("Extra", __base__=_Fields, **_extra_fields)


class GenerationExtra(Extra):
    """What a request may have under `unmask`."""

    preset: str | None = None
    drafts: bool = False  # with `stream`: also send the canvas after each forward pass
    timeout: Annotated[float, Field(gt=0, le=LONGEST_REQUEST)] | None = None  # seconds


class _StreamOptions(_Fields):
    include_usage: bool = False


class _Request(_Fields):
    model: str | None = None


class GenerationRequest(_Request):
    """What requests for generated text have in common."""

    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stop: Annotated[list[str], BeforeValidator(_texts)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    unmask: GenerationExtra = Field(default_factory=GenerationExtra)
    # Without effect: names of whom a request is for, and values that ask for what is done anyway.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Annotated[Any, _only(False, why="is not supported: nothing is stored")] = None
    service_tier: Annotated[Any, _only("auto", "default", why="is not supported: leave it out")] = None
    frequency_penalty: Annotated[Any, _NO_PENALTY] = None
    presence_penalty: Annotated[Any, _NO_PENALTY] = None
    response_format: Annotated[Any, BeforeValidator(_format)] = None

    def settings(self) -> dict[str, Any]:
        """Fields of `DiffusionGenerationConfig`."""
        given = self.unmask.model_dump(exclude={"drafts", "timeout"}, exclude_none=True)
        given |= {"temperature": self.temperature, "seed": self.seed, "max_new_tokens": self.max_tokens}
        given["top_p"] = None if self.top_p == 1 else self.top_p  # all tokens
        return {name: value for name, value in given.items() if value is not None}


class ChatRequest(GenerationRequest):
    """`/v1/chat/completions`."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[
        Any, _only(0, why="is not supported: alternatives are not kept; leave it out")
    ] = None
    tools: list[Any] | None = None
    tool_choice: Annotated[
        Any, _only("auto", "none", why="must be 'auto' or 'none': calls are not forced")
    ] = None
    parallel_tool_calls: Annotated[Any, _only(True, why="must be true: the model decides")] = None


class CompletionRequest(GenerationRequest):
    """`/v1/completions`."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    best_of: Annotated[Any, _only(1, why="is not supported: use n")] = None


class ScoreRequest(_Request):
    """`/v1/score`: a conversation whose last turn is scored, or a text after a prompt."""

    messages: list[Any] | None = None
    tools: list[Any] | None = None
    prompt: Annotated[list[Any], BeforeValidator(_prompts)] | None = None
    text: Annotated[list[Any], BeforeValidator(_prompts)] | None = None
    end_fill: Annotated[int, Field(ge=1, le=MOST_END_FILL)] = (
        1  # end tokens fill the last turn to a multiple of it
    )
    estimator: str = "exact_k"
    samples: Annotated[int, Field(ge=2, le=MOST_SAMPLES, multiple_of=2)] = 64
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0


class InfillRequest(GenerationRequest):
    """`/v1/infill`: a text with gaps, or the canvas of an answer of which some tokens are masked again."""

    text: str | None = None
    messages: list[Any] | None = None
    canvas: list[Annotated[int, Field(ge=0)] | None] | None = None  # null = a token to fill
    n: Annotated[Any, _only(1, why="is not supported here")] = None
    stop: Annotated[Any, _only(why="has no effect in a gap")] = None
    max_tokens: Annotated[Any, _only(why="has no effect: the gaps say their lengths")] = None
    logit_bias: Annotated[Any, _only(why="is not supported here")] = None


def read_request(kind: type[BaseModel], body: bytes) -> Any:
    """Read a body of JSON; raises a `RequestError` that names the field."""
    try:
        values = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(kind, error) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


_INNER: dict[str, type[BaseModel]] = {"unmask": GenerationExtra, "stream_options": _StreamOptions}


def _refusal(kind: type[BaseModel], error: ValidationError) -> RequestError:
    """Name the first field that is wrong."""
    first = error.errors()[0]
    path = [str(part)[:80] for part in first["loc"][:2]]
    parent = _INNER.get(path[0], kind) if len(path) > 1 else kind
    if path[0] not in _INNER:  # what follows is the place within a list, or a kind
        path = path[:1]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        hint = _nearest(path[-1], parent, kind)
        return RequestError(f"unknown field {name!r}; {hint}", name, code="unknown_field")
    if first["type"] == "missing":
        return RequestError(f"{name} is missing.", name)
    said = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    got = json.dumps(first["input"], default=str)
    shown = f"; got {got}" if len(got) <= 60 else ""
    return RequestError(f"{name}: {said}{shown}.", name)


def _nearest(name: str, parent: type[BaseModel], kind: type[BaseModel]) -> str:
    """Say which field was meant: one of `parent`, or of the other level of the request."""
    other: dict[str, Any] = {}
    where = ""
    if parent is GenerationExtra:
        other, where = kind.model_fields, "the request itself"
    elif parent is kind and "unmask" in kind.model_fields:
        other, where = GenerationExtra.model_fields, "'unmask'"
    if name in other:
        return f"it is a field of {where}."
    near = difflib.get_close_matches(name, [*parent.model_fields, *other], n=1)
    if not near:
        return f"known are {', '.join(parent.model_fields)}."
    return f"did you mean {near[0]!r}{'' if near[0] in parent.model_fields else f', a field of {where}'}?"
