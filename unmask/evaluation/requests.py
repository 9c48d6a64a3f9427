"""From the requests of lm-evaluation-harness to token ids and to settings of decoding."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Encoder, Example, document_ids
from unmask.data.records import Turn
from unmask.errors import UnmaskError
from unmask.generation.config import SETTINGS, DiffusionGenerationConfig
from unmask.generation.prompts import before_answer, chat_encoder, following_ids, with_prefix

DEFAULT_TOKENS = 256  # token limit of a task that names none: the harness's own default
# Of the settings, what belongs to the model or to the way results are returned.
_OTHERS = ("seed", "use_cache", "return_trace", "return_dict_in_generate")
DECODING = [
    n
    for n in SETTINGS
    if n not in _OTHERS and not n.endswith(("token_id", "suppress_tokens", "unused_tokens"))
]
_GAP = re.compile(r"[1-9]\d*(-[1-9]\d*)?")


@dataclass(frozen=True)
class Decoding:
    """How one request is to be answered."""

    settings: dict[str, Any]  # all settings of decoding; max_new_tokens is the canvas
    stop: tuple[str, ...]
    suffix: str | None  # text after a gap to fill
    gap: str  # tokens of that gap: "12", or "4-24" to try


def decoding_of(
    own: DiffusionGenerationConfig,
    gen_kwargs: Mapping[str, Any],
    canvas: int | str,
    override: Mapping[str, Any],
    where: str,
) -> Decoding:
    """Settings of a request: the checkpoint's own, changed by those of its task and then by those of the run.

    A task says how to sample (`do_sample`, `temperature`, `top_p`, `top_k`), `until` and its token limit under
    the names that the harness knows; and settings of `DiffusionGenerationConfig`. Without a temperature it is
    greedy, and one token is committed a step unless something else is said.

    Args:
        canvas: "task" = the token limit is the canvas; or a number of tokens.

    Raises:
        UnmaskError: names the request and the setting.
    """
    try:
        task = cast(dict[str, Any], normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_TOKENS))
    except (TypeError, ValueError) as error:
        raise UnmaskError(f"{where}: generation_kwargs: {error}.") from error
    stop, limit = tuple(text for text in task.pop("until") if text), task.pop("max_gen_toks")
    if not all(isinstance(text, str) for text in stop):
        raise UnmaskError(f"{where}: until must be strings; got {list(stop)}.")
    if limit < 1:
        raise UnmaskError(f"{where}: max_gen_toks must be at least 1; got {limit}.")
    suffix, gap = task.pop("suffix", None), str(task.pop("gap", limit))
    task["temperature"] = float(task.get("temperature", 0.0)) if task.pop("do_sample") else 0.0
    if not task["temperature"]:  # greedy, whatever else the task says about sampling
        task = {name: value for name, value in task.items() if name not in ("top_p", "top_k")}
    if not _GAP.fullmatch(gap):
        raise UnmaskError(f"{where}: gap must be a number of tokens or a range such as 4-24; got {gap!r}.")
    size = {"max_new_tokens": limit if canvas == "task" else canvas}
    config = copy.deepcopy(own)
    try:
        config.set(**{"steps": None, "min_new_tokens": 0, **task, **size})
        config.set(**{**override, **size})
    except UnmaskError as error:
        raise UnmaskError(f"{where}: {error}") from error
    return Decoding({name: getattr(config, name) for name in DECODING}, stop, suffix, gap)


class PromptEncoder:
    """Encodes the texts of requests.

    Args:
        positions: the longest sequence that the model takes.
        add_bos: put the BOS token before a context that no chat template made.
        name: of the checkpoint, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int, add_bos: bool, name: str) -> None:
        if add_bos and tokenizer.bos_token_id is None:
            raise UnmaskError(f"{name}: add_bos: the tokenizer has no BOS token.")
        self.tokenizer, self.positions, self.name = tokenizer, positions, name
        self.bos = [cast(int, tokenizer.bos_token_id)] * add_bos
        self._rendered: dict[str, tuple[Example, list[Turn] | None]] = {}

    @property
    def chat(self) -> Encoder:
        """The encoder of conversations; an `UnmaskError` for a tokenizer without a chat template."""
        if not self.tokenizer.chat_template:
            raise UnmaskError(f"{self.name}: the tokenizer has no chat template; evaluate without it.")
        return chat_encoder(self.tokenizer)

    def render(self, messages: Sequence[Mapping[str, str]], *, prefilled: bool) -> str:
        """Render a conversation up to its answer, or with `prefilled` to the end of its last turn.

        The ids are kept for `context`: special-token strings in a message stay text, and earlier answers keep
        their blocks.
        """
        turns, encoder = [Turn(message["role"], message["content"]) for message in messages], self.chat
        prefix = turns.pop().content if prefilled else ""
        example = encoder.prompt_example(turns)
        if prefix:
            example = with_prefix(before_answer(example, turns, (), encoder), prefix, self.tokenizer)
        text = str(self.tokenizer.decode(example.input_ids))
        self._rendered[text] = example, None if prefix else turns
        return text

    def context(self, text: str) -> Example:
        """Encode the context of an answer to write."""
        if text in self._rendered:
            return self._rendered[text][0]
        ids = self.bos + document_ids(text, self.tokenizer)
        return Example(ids, [False] * len(ids))

    def pair(self, context: str, continuation: str, where: str) -> Example:
        """Encode a context and the continuation to score, `src_mask` False.

        A plain text is tokenized as a whole, as the harness does; what is scored starts with the first token
        that is not also one of the context alone. After a conversation it starts where a plain answer does.
        """
        if context in self._rendered:
            example, turns = self._rendered[context]
            if turns is not None:
                example = before_answer(example, turns, (), self.chat)
            before, ids = example.input_ids, following_ids(example, continuation, self.tokenizer)
        else:
            alone = self.bos + document_ids(context.rstrip(" "), self.tokenizer)
            whole = self.bos + document_ids(context + continuation, self.tokenizer)
            pairs = enumerate(zip(alone, whole, strict=False))
            same = next((at for at, (a, b) in pairs if a != b), min(len(alone), len(whole)))
            before, ids = whole[:same], whole[same:]
        self.check_length(len(before), len(ids), where)
        return Example(before + ids, [True] * len(before) + [False] * len(ids))

    def windows(self, text: str, size: int) -> list[Example]:
        """Cut a text into windows of `size` tokens; the last is given the tokens before it that fit."""
        ids, windows = self.bos + document_ids(text, self.tokenizer), []
        for start in range(0, len(ids), size):
            stop = min(start + size, len(ids))
            begin = max(0, stop - size) if stop == len(ids) else start
            given = max(start - begin, len(self.bos) if begin == 0 else 0)
            windows.append(Example(ids[begin:stop], [True] * given + [False] * (stop - begin - given)))
        return windows

    def check_length(self, prompt: int, new: int, where: str) -> None:
        """Refuse what the model has no positions for."""
        if prompt + new > self.positions:
            raise UnmaskError(
                f"{where}: a context of {prompt:,} tokens and {new:,} to write or score exceed the model's"
                f" {self.positions:,} positions; use a smaller canvas or fewer examples in the prompt."
            )
