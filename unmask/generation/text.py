"""Prompts -> texts: completions of any number of prompts, and stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.data.encode import Example
from unmask.data.tokenizer import ids_without_token
from unmask.errors import UnmaskError
from unmask.generation.prompts import prompt_example
from unmask.generation.rows import Event


@dataclass
class Completion:
    """What a model wrote; commit_step, confidence and entropy have an entry for each id."""

    text: str
    """The answer without special tokens, and up to a stop string."""
    ids: list[int]
    """Its token ids, the end token included."""
    commit_step: list[int]
    """Denoising step, from 0, that committed each token."""
    confidence: list[float] = field(default_factory=list)
    """The model's probability at that step."""
    entropy: list[float] = field(default_factory=list)
    """The entropy of the model's distribution at that step, in nats."""
    num_forwards: int = 0
    """Denoising steps."""
    states: list[list[int]] = field(default_factory=list)
    """The canvas after each step, if asked for."""

    @property
    def figures(self) -> str:
        """Tokens and denoising steps, in words."""
        tokens, steps = len(self.ids), self.num_forwards
        return f"{tokens} token{'s' * (tokens != 1)} in {steps} denoising step{'s' * (steps != 1)}"

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the response, the end token included, per denoising step."""
        return len(self.ids) / max(1, self.num_forwards)


class StopStrings(StoppingCriteria):
    """Ends a response once one of `strings` is in it, in whatever tokens; the prompt is not searched.

    transformers' own criterion also finds a string that begins in the prompt, and first prepares a table of
    the whole vocabulary. An empty string is an `UnmaskError`: it would end every response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        if isinstance(strings, str):
            raise UnmaskError(f"stop must be a list of strings; got {strings!r}: write [{strings!r}].")
        if not all(strings):
            raise UnmaskError("stop: a stop string must not be empty.")
        self.tokenizer, self.strings = tokenizer, list(strings)
        # A token has a byte or more, so no more tokens than bytes can be part of a string. Four more on the
        # left keep a character whole.
        self.reach = max((len(string.encode()) for string in strings), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, *, prompt_length: int = 0, **_: Any) -> Tensor:
        """Say for a row (1, L) whether it ends here; its first `prompt_length` tokens are the prompt."""
        tail = input_ids[0, max(prompt_length, input_ids.shape[1] - self.reach) :].tolist()
        text = str(self.tokenizer.decode(tail, skip_special_tokens=True))
        return torch.tensor([self.cut(text) != text])

    def cut(self, text: str) -> str:
        """The text before the first stop string; all of it if there is none."""
        return min((text.partition(string)[0] for string in self.strings), key=len, default=text)


@dataclass
class _Running:
    """A prompt that is being answered."""

    index: int
    stop: StopStrings
    states: list[list[int]] = field(default_factory=list)

    def note(self, event: Event, mask: int) -> None:
        """Add the canvas as it is after a step."""
        canvas = list(self.states[-1]) if self.states else [mask] * event.length
        event.apply(canvas, mask)
        self.states.append(canvas)


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int] | Example],
    **options: Any,
) -> list[Completion]:
    """Generate a completion of every prompt, in their order; see `completions`.

    ```python
    [answer] = complete(model, tokenizer, ["Reverse the word monk."], steps=8)
    answer.text
    ```

    Raises:
        UnmaskError: a prompt cannot be completed; it is named by its number, from 1.
    """
    found = dict(completions(model, tokenizer, prompts, **options))
    return [found[index] for index in range(len(prompts))]


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int] | Example],
    *,
    batch_size: int = 64,
    each: Sequence[Mapping[str, Any]] = (),
    stop: Sequence[str] = (),
    keep_states: bool = False,
    advance: Callable[[int], None] | None = None,
    engine: Any = None,
    watch: Callable[[Event], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Completion]]:
    """Generate completions; yields (index of the prompt, its completion) as they are done.

    Up to `batch_size` prompts are answered at once, and another one begins when one is done. An answer
    depends on its prompt, settings and seed alone.

    Args:
        prompts: texts, encoded as what a user says; token ids, all of them source; or examples, whose
            `src_mask` says what training would mask, such as earlier responses (it matters to block-causal
            models).
        each: settings of each prompt, "stop" and "seed" among them, that override those of all.
        stop: strings that end a response, which ends before them.
        keep_states: also return the canvas after each step, and the model's confidence and entropy.
        advance: called with 1 for each prompt done.
        engine: of `model.make_engine`, whose cache may know the beginning of the prompts already.
        watch: called with every event.
        **settings: fields of `DiffusionGenerationConfig`, `seed` one number or one for each prompt.
    """
    if batch_size < 1:
        raise UnmaskError(f"batch_size must be 1 or more; got {batch_size}.")
    if isinstance(prompts, str):
        raise UnmaskError("prompts must be a list of prompts; got one text: put it into a list.")
    examples = [_example(prompt, tokenizer) for prompt in prompts]
    settings.setdefault("unused_tokens", ids_without_token(tokenizer, model.config.vocab_size))
    if isinstance(settings.get("seed"), Sequence):
        if (count := len(settings["seed"])) != len(prompts):
            raise UnmaskError(f"seed: {count} numbers for {len(prompts)} prompts; give one for each.")
        each = [
            {"seed": s, **own}
            for s, own in zip(settings.pop("seed"), each or [{}] * len(prompts), strict=True)
        ]
    if each and len(each) != len(prompts):
        raise UnmaskError(f"each: {len(each)} settings for {len(prompts)} prompts; give one for each.")
    if engine is None:
        size = max((len(example.input_ids) for example in examples), default=0)
        canvases = [_canvas(model, {**settings, **own}) for own in each or [{}]]
        longest = None if None in canvases else size + max(n for n in canvases if n is not None)
        engine = model.make_engine(max_rows=max(1, min(batch_size, len(examples))), longest=longest)
    waiting = deque(range(len(examples)))
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * batch_size:  # so that there is always one to begin
                index = waiting.popleft()
                own = {"return_trace": keep_states, "stop": stop, **settings, **(each[index] if each else {})}
                strings = StopStrings(tokenizer, own.pop("stop") or ())
                if strings.strings:
                    own["stopping_criteria"] = strings
                with _naming(index, len(examples)):
                    slot = engine.add(examples[index].input_ids, examples[index].src_mask, **own)
                running[slot] = _Running(index, strings)
            if not engine.num_rows:
                raise UnmaskError("engine: another call took the events of this one; let each finish first.")
            for event in engine.step():
                if (row := running.get(event.slot)) is None:
                    continue
                if watch is not None:
                    watch(event)
                if keep_states:
                    row.note(event, engine.mask_token_id)
                if event.done:
                    del running[event.slot]
                if event.error is not None:
                    with _naming(row.index, len(examples)):
                        raise event.error
                if (answer := event.answer) is not None:
                    if advance is not None:
                        advance(1)
                    text = row.stop.cut(str(tokenizer.decode(answer.ids, skip_special_tokens=True)))
                    figures = answer.commit_step, answer.confidence, answer.entropy, answer.num_forwards
                    yield row.index, Completion(text, answer.ids, *figures, row.states)
    finally:
        for slot in running:
            engine.drop(slot)


def _example(prompt: str | list[int] | Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    if isinstance(prompt, Example):
        return prompt
    return (
        prompt_example(tokenizer, prompt)
        if isinstance(prompt, str)
        else Example(prompt, [True] * len(prompt))
    )


def _canvas(model: Any, settings: Mapping[str, Any]) -> int | None:
    """Length of the canvas; None where other settings than its own decide."""
    size = settings.get("max_new_tokens")
    if size is None and settings.get("preset") is None and settings.get("generation_config") is None:
        size = model.generation_config.max_new_tokens
    return size if isinstance(size, int) else None


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Say which of several prompts an error is about."""
    try:
        yield
    except (UnmaskError, ValueError) as error:
        if count == 1:
            raise
        raise UnmaskError(f"prompt {index + 1} of {count}: {error}") from error
