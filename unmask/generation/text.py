"""Prompts -> texts: chat and raw prompts, stop strings, files of prompts and of answers."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.data.collate import collate
from unmask.data.encode import Encoder, Example, document_ids
from unmask.data.files import read_records
from unmask.data.records import Conversation, Turn, to_conversation
from unmask.data.tokenizer import ids_without_token
from unmask.errors import UnmaskError, UnmaskWarning

MISSING = "?"  # takes the place of a missing answer, so that a record without one is read like any other


@dataclass
class Completion:
    """What a model wrote; commit_step, confidence and entropy have an entry for each id."""

    text: str  # without special tokens, and up to a stop string
    ids: list[int]  # the end token included
    commit_step: list[int]  # denoising step, from 0, that committed each token
    confidence: list[float] = field(default_factory=list)  # the model's probability at that step
    entropy: list[float] = field(default_factory=list)  # of the model at that step, in nats
    num_forwards: int = 0  # denoising steps
    states: list[list[int]] = field(default_factory=list)  # the canvas after each step, if asked for

    @property
    def figures(self) -> str:
        """Tokens and denoising steps, in words."""
        tokens, steps = len(self.ids), self.num_forwards
        return f"{tokens} token{'s' * (tokens != 1)} in {steps} denoising step{'s' * (steps != 1)}"

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the response, the end token included, per denoising step."""
        return len(self.ids) / max(1, self.num_forwards)


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


def chat_example(
    encoder: Encoder, turns: Sequence[Turn], tools: Sequence[Any] = (), *, to_answer: bool = False
) -> Example:
    """Encode turns up to where training lets the next response start.

    Args:
        to_answer: up to where a plain answer starts in that response: after an empty think block, if the
            template writes one.
    """
    example = encoder.prompt_example(turns, tools)
    if not to_answer:
        return example
    answered = Conversation((*turns, Turn("assistant", MISSING)), "the prompt", tuple(tools))
    response = encoder.encode(answered).input_ids[len(example.input_ids) :]
    size = response.index(encoder.end_token_id) - len(document_ids(MISSING, encoder.tokenizer))
    return Example(example.input_ids + response[:size], example.src_mask + [False] * size)


def prompt_example(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    raw: bool = False,
    system: str | None = None,
    prefix: str = "",
    to_answer: bool = False,
) -> Example:
    """Encode one prompt: what a user says (not empty), or with `raw` the beginning of a text; then `prefix`."""
    if raw:
        return with_prefix(raw_example(tokenizer, text), prefix, tokenizer)
    if not text.strip():
        raise UnmaskError("the prompt is empty; say something, or generate from nothing with --raw.")
    turns = [Turn("user", text)] if system is None else [Turn("system", system), Turn("user", text)]
    example = chat_example(chat_encoder(tokenizer), turns, to_answer=to_answer)
    return with_prefix(example, prefix, tokenizer)


class StopStrings(StoppingCriteria):
    """Ends a response once one of `strings` is in it, in whatever tokens; the prompt is not searched.

    transformers' own criterion also finds a string that begins in the prompt, and first prepares a table of
    the whole vocabulary.

    Raises:
        UnmaskError: an empty string, which would end every response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
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
        return torch.full((1,), self.cut(text) != text, device=input_ids.device)

    def cut(self, text: str) -> str:
        """The text before the first stop string; all of it if there is none."""
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        return text[: min(starts)] if starts else text


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int] | Example],
    *,
    batch_size: int = 64,
    stop: Sequence[str] = (),
    keep_states: bool = False,
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Generate a completion of every prompt.

    Prompts of similar length are generated together; the answers do not depend on it.

    Args:
        prompts: token ids, all of them source; or examples, whose `src_mask` says what training would mask,
            such as earlier responses (it matters to block-causal models).
        batch_size: prompts per forward pass; does not change the answers.
        stop: strings that end a response, which ends before them.
        keep_states: also return the canvas after each step.
        advance: called with the number of prompts done after each batch.
        **settings: fields of `DiffusionGenerationConfig`, `seed` one number or one for each prompt; or a
            `streamer`, for a single prompt.
    """
    examples = [p if isinstance(p, Example) else Example(p, [True] * len(p)) for p in prompts]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    seeds = settings.pop("seed", None)
    stop_strings = StopStrings(tokenizer, stop)
    settings.setdefault("unused_tokens", ids_without_token(tokenizer, model.config.vocab_size))
    if stop:
        settings["stopping_criteria"] = stop_strings
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        if seeds is not None:
            settings["seed"] = [seeds[i] for i in indices] if isinstance(seeds, Sequence) else seeds
        batch = collate([examples[i] for i in indices], pad_token_id=0, padding_side="left")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "src_mask")}
        inputs["src_mask"] &= inputs["attention_mask"].bool()
        output = model.generate(**inputs, return_trace=True, **settings)
        for row, index in enumerate(indices):
            in_answer = output.commit_step[row] >= 0
            ids = output.sequences[row, inputs["input_ids"].shape[1] :][in_answer].tolist()
            states = output.states[row].tolist() if keep_states else []
            while len(states) > 1 and states[-1] == states[-2]:  # fewer steps than others of the batch
                states.pop()
            completions[index] = Completion(
                stop_strings.cut(str(tokenizer.decode(ids, skip_special_tokens=True))),
                ids,
                output.commit_step[row, in_answer].tolist(),
                output.confidence[row, in_answer].tolist(),
                output.entropy[row, in_answer].tolist(),
                int(output.num_forwards[row]),
                states,
            )
        if advance is not None:
            advance(len(indices))
    return [completions[index] for index in range(len(prompts))]


# Files of prompts.


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file."""

    example: Example  # src_mask False = an earlier response, which training would mask
    text: str  # its last user turn, or the raw text
    location: str = ""  # file and line, for messages
    expected: str = ""  # the answer, where the file has it


def read_prompts(
    file: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    raw: bool = False,
    system: str | None = None,
    prefix: str = "",
    to_answer: bool = False,
) -> list[Prompt]:
    """Read prompts: records of any known format, or a `.txt` file with one prompt a line, blank ones skipped.

    Everything before the last response of a record is its prompt; a record may lack that response. Warns of
    fields that no prompt was made of.

    Args:
        raw: texts to continue without the chat template: lines, or the field "prompt" or "text".
        system: a system prompt for all that have none.
        prefix: the beginning of every response.
        to_answer: see `chat_example`.

    Raises:
        UnmaskError: the file or a record cannot be used, a prompt is empty, or there is none.
    """
    path, prompts = Path(file).expanduser(), []
    unused: Counter[str] = Counter()
    encoder = None if raw else chat_encoder(tokenizer)
    is_text = path.suffix.lower() == ".txt" and path.is_file()
    for record, location in _lines(path) if is_text else read_records(file):
        if encoder is None:
            text = record.get("prompt", record.get("text"))
            if not isinstance(text, str):
                raise UnmaskError(
                    f"{location}: with --raw a text is read from the field 'prompt' or 'text'; fields here:"
                    f" {', '.join(map(str, record))}."
                )
            example = raw_example(tokenizer, text)
        else:
            asked = prompt_of(record, location)
            unused.update(asked.unused)
            turns = list(asked.turns)
            text = next(turn.content for turn in reversed(turns) if turn.role == "user")
            if system is not None and turns[0].role != "system":
                turns.insert(0, Turn("system", system))
            example = chat_example(encoder, turns, asked.tools, to_answer=to_answer)
        if not (text if raw else text.strip()):
            raise UnmaskError(f"{location}: the prompt is empty.")
        prompts.append(Prompt(with_prefix(example, prefix, tokenizer), text, location))
    if not prompts:
        raise UnmaskError(f"{file}: there is no prompt in it.")
    if unused:
        names = ", ".join(f"{name} ({count:,})" for name, count in unused.items())
        warnings.warn(f"{file}: fields not used: {names}.", UnmaskWarning, stacklevel=2)
    return prompts


def prompt_of(record: Mapping[str, Any], location: str) -> Conversation:
    """Read a record up to its last response, which it may lack; raises an `UnmaskError` as `to_conversation`."""
    asked = to_conversation(record, where=location, answered=False)
    turns = asked.turns[:-1] if asked.turns[-1].role == "assistant" else asked.turns
    return replace(asked, turns=turns)


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> None:
    """Check that every prompt leaves room for its answer; an `UnmaskError` names the first that does not."""
    for prompt in prompts:
        size = len(prompt.example.input_ids)
        if size + max_new_tokens > positions:
            raise UnmaskError(
                f"{prompt.location}: a prompt of {size} tokens and max_new_tokens = {max_new_tokens} need"
                f" more than the model's {positions} positions; shorten one of them."
            )


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a text file that are not blank, as records, with their locations."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = bytes(error.object).count(b"\n", 0, error.start) + 1
        raise UnmaskError(f"{path.name} line {line}: not UTF-8 text; save the file as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield {"prompt": line}, f"{path.name} line {number}"


# Files of answers.

Answer = Callable[[Sequence[Example], Sequence[int], Callable[[int], None] | None], list[dict[str, Any]]]
"""(prompts, their seeds, a function called with the number done) -> the fields of the line of each."""


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
    *,
    prefix: str = "",
    **settings: Any,
) -> list[dict[str, Any]]:
    """Answer prompts by `complete`; `prefix` is what they already begin the response with."""
    return [
        {
            "response": prefix + done.text,
            "tokens": len(done.ids),
            "forwards": done.num_forwards,
            "tokens_per_forward": round(done.tokens_per_forward, 4),
        }
        for done in complete(model, tokenizer, examples, seed=list(seeds), advance=advance, **settings)
    ]


def answer_file(
    answer: Answer,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    samples: int = 1,
    seed: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    flush_every: int = 64,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Answer prompts and write one JSON line an answer, in the order of the prompts; resumable.

    Args:
        answer: `generate_answers` or `unmask.evaluation.choose.choose_answers` with a model and settings.
        samples: answers to each prompt; answer i is drawn from seed + i.
        resume: continue after the lines that `out` has; they must be of these prompts and settings.
        settings: written in every line.
        flush_every: answers between two writes.
        advance: called with the number of answers done, those already in the file first.

    Returns:
        answers, tokens and forwards (denoising steps) of the whole file.
    """
    heads: list[dict[str, Any]] = [
        {
            "index": index,
            "sample": i,
            "seed": seed + i,
            "settings": dict(settings or {}),
            "prompt": prompt.text,
        }
        for index, prompt in enumerate(prompts)
        for i in range(samples)
    ]
    data = out.read_bytes() if resume and out.exists() else b""
    size = data.rfind(b"\n") + 1  # of whole lines
    lines = _read_answers(data[:size].splitlines(), heads, out)
    totals = Counter({"answers": 0, "tokens": 0, "forwards": 0})
    for line in lines:
        totals.update(answers=1, tokens=line.get("tokens", 0), forwards=line.get("forwards", 0))
    if advance is not None and lines:
        advance(len(lines))
    with out.open("r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        for start in range(len(lines), len(heads), flush_every):
            batch = heads[start : start + flush_every]
            examples = [prompts[head["index"]].example for head in batch]
            answers = answer(examples, [head["seed"] for head in batch], advance)
            for head, line in zip(batch, answers, strict=True):
                totals.update(answers=1, tokens=line.get("tokens", 0), forwards=line.get("forwards", 0))
                file.write(json.dumps({**head, **line}, ensure_ascii=False).encode() + b"\n")
            file.flush()
    return dict(totals)


def _read_answers(texts: list[bytes], heads: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Read the lines of a file of answers, which must begin with the heads."""
    if len(texts) > len(heads):
        raise UnmaskError(f"{out}: has {len(texts):,} answers, but there are {len(heads):,} to give.")
    lines: list[dict[str, Any]] = []
    for number, (text, head) in enumerate(zip(texts, heads, strict=False), 1):
        try:
            line = json.loads(text)
            changed = [name for name in head if line[name] != head[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnmaskError(f"{out} line {number}: is not an answer; remove the file.") from error
        for name in changed:
            raise UnmaskError(
                f"{out} line {number}: {name} is {line[name]!r}, now it would be {head[name]!r};"
                " resume with the same prompts and settings, or write another file."
            )
        lines.append(line)
    return lines
