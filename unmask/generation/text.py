"""Prompts -> texts: chat and raw prompts, stop strings, files of prompts and of answers."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.data.encode import Encoder, Example, document_ids
from unmask.data.files import read_records
from unmask.data.records import Conversation, CustomFields, Turn, call_text, to_conversation
from unmask.data.tokenizer import ids_without_token
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.rows import Event
from unmask.processes import gather, rank_and_size
from unmask.shipped import find_shipped

SHARED = 64  # prompts that each of several processes answers before they exchange the answers
MISSING = "?"  # takes the place of a missing answer, so that a record without one is read like any other


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


# Prompts.


@dataclass(frozen=True)
class Prompt:
    """A prompt with what it was made of."""

    example: Example
    """`src_mask` False = an earlier response, which training would mask."""
    text: str
    """Its last user turn, or the raw text."""
    location: str = ""
    """File and line, for messages."""
    expected: str = ""
    """The response of the record, where it has one."""


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Make the encoder of chat prompts; raises an `UnmaskError` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; give the prompt as plain text (--raw).")
    return Encoder(tokenizer, layout="chat")


def raw_example(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Encode the beginning of a plain text; special-token strings in it are text, as in training."""
    ids = document_ids(text, tokenizer)
    return Example(ids, [False] * len(ids))


def following_ids(before: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text that follows a prompt, or the beginning of a text.

    SentencePiece-like tokenizers put a space before every text. It belongs there where a chat template writes
    it before a response: not after a line break, and not in the middle of a plain text.
    """
    ids, line, spaced = document_ids(text, tokenizer), *(document_ids(x, tokenizer) for x in ("\n", "\nx"))
    if not before.input_ids or spaced == line + document_ids("x", tokenizer):
        return ids
    if any(before.src_mask) and not str(tokenizer.decode(before.input_ids[-1:])).endswith("\n"):
        return ids
    return document_ids("\n" + text, tokenizer)[len(line) :]


def with_prefix(example: Example, prefix: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the prompt followed by `prefix`, the beginning of the response."""
    ids = following_ids(example, prefix, tokenizer) if prefix else []
    return Example(example.input_ids + ids, example.src_mask + [False] * len(ids))


def before_answer(example: Example, turns: Sequence[Turn], tools: Sequence[Any], encoder: Encoder) -> Example:
    """Add to the prompt of these turns what training shows before a plain answer: an empty think block."""
    asked = Conversation((*turns, Turn("assistant", MISSING)), "the prompt", tuple(tools))
    response = encoder.encode(asked).input_ids[len(example.input_ids) :]
    size = response.index(encoder.end_token_id) - len(document_ids(MISSING, encoder.tokenizer))
    return Example(example.input_ids + response[:size], example.src_mask + [False] * size)


def make_prompts(
    records: Iterable[tuple[Mapping[str, Any], str]],
    encoder: Encoder,
    format: str = "auto",
    custom_format: CustomFields | None = None,
    *,
    answered: bool = True,
    system: str | None = None,
    prefix: str = "",
    to_answer: bool = False,
) -> list[Prompt]:
    """Make the prompt of each record: all up to where training lets its last response start.

    Warns of fields that no prompt is made of, and of turns that the chat template leaves out.

    Args:
        records: see `read_records`; format, custom_format: see `to_conversation`.
        answered: every record has a response; otherwise one that ends without it is asked for the next.
        system: a system prompt for all that have none.
        prefix: the beginning of every response.
        to_answer: go on to where a plain answer starts: after an empty think block, if training has one.

    Raises:
        UnmaskError: a record cannot be used, or its prompt is empty.
    """
    prompts = []
    for record, where in records:
        read = to_conversation(record, format, where=where, custom_format=custom_format, answered=answered)
        if read.unused:
            warnings.warn(f"prompts: fields not used: {', '.join(read.unused)}.", UnmaskWarning, stacklevel=2)
        turns = list(read.turns)
        while answered and turns[-1].role != "assistant":
            turns.pop()
        expected = call_text(turns.pop()) if turns[-1].role == "assistant" else ""
        text = next((turn for turn in reversed(turns) if turn.role == "user"), turns[0]).content
        if not text.strip():
            raise UnmaskError(f"{where} is empty; say something, or generate from nothing with --raw.")
        if system is not None and turns[0].role != "system":
            turns.insert(0, Turn("system", system))
        example = encoder.prompt_example(turns, read.tools)
        if to_answer:
            example = before_answer(example, turns, read.tools, encoder)
        prompts.append(Prompt(with_prefix(example, prefix, encoder.tokenizer), text, where, expected))
    return prompts


def prompt_example(
    tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool = False, prefix: str = "", **options: Any
) -> Example:
    """Encode one prompt: what a user says, or with `raw` the beginning of a text; see `make_prompts`."""
    if raw:
        return with_prefix(raw_example(tokenizer, text), prefix, tokenizer)
    asked, encoder = [({"prompt": text}, "the prompt")], chat_encoder(tokenizer)
    [prompt] = make_prompts(asked, encoder, answered=False, prefix=prefix, **options)
    return prompt.example


def read_prompts(
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    prefix: str = "",
    longest: int | None = None,
    **options: Any,
) -> list[Prompt]:
    """Read prompts: records of any known format, or a `.txt` file with one prompt a line, blank ones skipped.

    Args:
        raw: texts to continue without the chat template: lines, or the field "prompt" or "text".
        longest: tokens of a prompt at most.
        prefix: see `make_prompts`.
        **options: see `make_prompts`.

    Raises:
        UnmaskError: the file or a record cannot be used, a prompt is empty or too long, or there is none.
    """
    path = Path(find_shipped(file)).expanduser()
    records = _lines(path) if path.suffix.lower() == ".txt" and path.is_file() else read_records(file)
    if raw:
        texts = [(_raw_text(record, where), where) for record, where in records]
        prompts = [
            Prompt(prompt_example(tokenizer, text, raw=True, prefix=prefix), text, where)
            for text, where in texts
        ]
    else:
        prompts = make_prompts(records, chat_encoder(tokenizer), answered=False, prefix=prefix, **options)
    if not prompts:
        raise UnmaskError(f"{file}: there is no prompt in it.")
    for prompt in prompts:
        if longest is not None and (size := len(prompt.example.input_ids)) > longest:
            raise UnmaskError(
                f"{prompt.location}: a prompt of {size} tokens; max_new_tokens leaves {longest} of the model's"
                " positions for it: shorten one of them."
            )
    return prompts


def _raw_text(record: Mapping[str, Any], where: str) -> str:
    if isinstance(text := record.get("prompt", record.get("text")), str):
        return text
    raise UnmaskError(
        f"{where}: with --raw a text is read from the field 'prompt' or 'text'; fields here:"
        f" {', '.join(map(str, record))}."
    )


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a text file that are not blank, as records, with their locations."""
    for text, _ in read_records(path, text=True):
        for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
            if line.strip():
                yield {"prompt": line}, f"{path.name} line {number}"


# Completions.


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


# Files of answers.

Answer = Callable[
    [Sequence[Example], Sequence[int], Callable[[int], None] | None], Iterable[tuple[int, dict[str, Any]]]
]
"""(prompts, their seeds, a function called with the number done) -> index and fields of the line of each, in any
order."""


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
    *,
    prefix: str = "",
    **settings: Any,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer prompts by `completions`; `prefix` is what they already begin the response with."""
    for index, done in completions(model, tokenizer, examples, seed=list(seeds), advance=advance, **settings):
        yield (
            index,
            {
                "response": prefix + done.text,
                "tokens": len(done.ids),
                "forward_passes": done.num_forwards,
                "tokens_per_forward": round(done.tokens_per_forward, 4),
            },
        )


def answer_file(
    answer: Answer,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    samples: int = 1,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Answer prompts and write one JSON line an answer, in the order of the prompts; resumable.

    Several processes share the prompts out, and the first writes.

    Args:
        answer: `generate_answers` or `unmask.evaluation.choose.choose_answers` with a model and settings.
        samples: answers to each prompt; answer i is drawn from seed + i.
        resume: continue after the lines that `out` has; they must be of these prompts and settings.
        settings: written in every line.
        advance: called with the number of answers done, those already in the file first.

    Returns:
        Numbers of answers, tokens and forward_passes (denoising steps) of the whole file.
    """
    told = dict(settings or {})
    heads: list[dict[str, Any]] = [
        {"index": index, "sample": i, "seed": seed + i, "settings": told, "prompt": prompt.text}
        for index, prompt in enumerate(prompts)
        for i in range(samples)
    ]
    data = out.read_bytes() if resume and out.exists() else b""
    size = data.rfind(b"\n") + 1  # of whole lines
    lines = _read_answers(data[:size].splitlines(), heads, out)
    if advance is not None and lines:
        advance(len(lines))
    gather(None)  # all have read the file before one writes it
    own = out.open("r+b" if size else "wb") if rank_and_size()[0] == 0 else io.BytesIO()
    with own as file:
        file.truncate(size)
        file.seek(size)
        left, done = heads[len(lines) :], {}
        examples = [prompts[head["index"]].example for head in left]
        written = len(lines)
        for index, line in _shared_out(answer, examples, [head["seed"] for head in left], advance):
            done[index] = {**left[index], **line}
            while (line := done.pop(len(lines) - written, None)) is not None:  # in the order of the prompts
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                lines.append(line)
    sums = {name: sum(line.get(name, 0) for line in lines) for name in ("tokens", "forward_passes")}
    return {"answers": len(lines), **sums}


def _shared_out(
    answer: Answer,
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers of all processes, each of which answers every n-th prompt."""
    rank, size = rank_and_size()
    if size == 1:
        yield from answer(examples, seeds, advance)
        return
    for start in range(0, len(examples), SHARED * size):
        mine = range(start + rank, min(start + SHARED * size, len(examples)), size)
        found = answer([examples[index] for index in mine], [seeds[index] for index in mine], advance)
        for lines in gather([(mine[index], line) for index, line in found]):
            yield from lines


def _read_answers(texts: list[bytes], heads: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of answers, which must begin with the heads."""
    if len(texts) > len(heads):
        raise UnmaskError(f"{out}: has {len(texts):,} answers, but there are {len(heads):,} to give.")
    lines: list[dict[str, Any]] = []
    for number, (text, head) in enumerate(zip(texts, heads, strict=False), 1):
        try:
            lines.append(json.loads(text))
            changed = [name for name in head if lines[-1][name] != head[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnmaskError(f"{out} line {number}: is not an answer; remove the file.") from error
        for name in changed:
            raise UnmaskError(
                f"{out} line {number}: {name} is {lines[-1][name]!r}, now it would be {head[name]!r};"
                " resume with the same prompts and settings, or write another file."
            )
    return lines
