"""Prompts -> texts: chat and raw prompts, stop strings, files of prompts and of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.data.encode import Encoder, Example, document_ids
from unmask.data.files import read_records
from unmask.data.records import ROLES, RecordError, Turn, detect_format, to_conversation
from unmask.errors import UnmaskError
from unmask.io import check_output_file

MISSING = "?"  # takes the place of a missing answer, so that a record without one is read like any other
_ANSWER_FIELDS = {"prompt": "completion", "instruction": "output"}


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


def chat_turns(user: str, system: str | None = None) -> list[Turn]:
    """Make the turns of a question."""
    turns = [Turn("user", user)]
    return turns if system is None else [Turn("system", system), *turns]


def chat_example(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Any] = ()
) -> Example:
    """Render turns with the checkpoint's chat template, up to where the next answer starts.

    Raises:
        UnmaskError: the tokenizer has no chat template, or the template refuses the turns.
    """
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; give the prompt as plain text (--raw).")
    return Encoder(tokenizer, layout="chat").prompt_example(turns, tools)


def raw_example(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Encode the beginning of a plain text; special-token strings in it are text, as in training."""
    ids = document_ids(text, tokenizer)
    return Example(ids, [False] * len(ids))


def with_prefix(example: Example, prefix: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the prompt followed by `prefix`, the beginning of the response."""
    more = raw_example(tokenizer, prefix)
    return Example(example.input_ids + more.input_ids, example.src_mask + more.src_mask)


def prompt_example(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    raw: bool = False,
    system: str | None = None,
    prefix: str = "",
) -> Example:
    """Encode one prompt: what a user says, or with `raw` the beginning of a text; then `prefix`.

    Raises:
        UnmaskError: an empty prompt, or a tokenizer without a chat template, unless `raw`.
    """
    if not text.strip() and not raw:
        raise UnmaskError("the prompt is empty; say something, or generate from nothing with --raw.")
    example = raw_example(tokenizer, text) if raw else chat_example(tokenizer, chat_turns(text, system))
    return with_prefix(example, prefix, tokenizer)


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a response under the tokenizer's chat template."""
    return Encoder(tokenizer, layout="chat").end_token_id


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
    if stop:
        settings["stopping_criteria"] = stop_strings
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        if seeds is not None:
            settings["seed"] = [seeds[i] for i in indices] if isinstance(seeds, Sequence) else seeds
        input_ids, attention_mask, src_mask = _left_padded([examples[i] for i in indices], model.device)
        output = model.generate(input_ids, attention_mask, src_mask=src_mask, return_trace=True, **settings)
        for row, index in enumerate(indices):
            in_answer = output.commit_step[row] >= 0
            ids = output.sequences[row, input_ids.shape[1] :][in_answer].tolist()
            completions[index] = Completion(
                stop_strings.cut(str(tokenizer.decode(ids, skip_special_tokens=True))),
                ids,
                output.commit_step[row, in_answer].tolist(),
                output.confidence[row, in_answer].tolist(),
                output.entropy[row, in_answer].tolist(),
                int(output.num_forwards[row]),
                _without_repeats(output.states[row].tolist()) if keep_states else [],
            )
        if advance is not None:
            advance(len(indices))
    return [completions[index] for index in range(len(prompts))]


def _without_repeats(states: list[list[int]]) -> list[list[int]]:
    """Without the repeated last state of a row that took fewer steps than others of its batch."""
    count = len(states)
    while count > 1 and states[count - 1] == states[count - 2]:
        count -= 1
    return states[:count]


def _left_padded(rows: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and source mask of prompts, padded on the left."""
    width = max(len(row.input_ids) for row in rows)
    pads = [width - len(row.input_ids) for row in rows]
    ids = [[0] * pad + row.input_ids for pad, row in zip(pads, rows, strict=True)]
    source = [[False] * pad + row.src_mask for pad, row in zip(pads, rows, strict=True)]
    is_token = torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]
    input_ids = torch.tensor(ids, dtype=torch.long, device=device)
    return input_ids, is_token, torch.tensor(source, dtype=torch.bool, device=device)


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
) -> list[Prompt]:
    """Read prompts: records of any known format, or a `.txt` file with one prompt a line.

    Everything before the last response of a record is its prompt; a record may lack that response. Blank
    lines of a text file are skipped.

    Args:
        raw: texts to continue without the chat template: lines, or the field "prompt" or "text".
        system: a system prompt for all that have none.
        prefix: the beginning of every response.

    Raises:
        UnmaskError: the file or a record cannot be used, a prompt is empty, or there is none.
    """
    path, prompts = Path(file).expanduser(), []
    is_text = path.suffix.lower() == ".txt" and path.is_file()
    for record, location in _lines(path) if is_text else read_records(file):
        tools: Sequence[Any] = ()
        if raw:
            text = record.get("prompt", record.get("text"))
            if not isinstance(text, str):
                raise UnmaskError(
                    f"{location}: with --raw a text is read from the field 'prompt' or 'text'; fields here:"
                    f" {', '.join(map(str, record))}."
                )
        else:
            turns, tools = prompt_turns(record, location)
            text = next(turn.content for turn in reversed(turns) if turn.role == "user")
            if system is not None and turns[0].role != "system":
                turns = [Turn("system", system), *turns]
        if not (text if raw else text.strip()):
            raise UnmaskError(f"{location}: the prompt is empty.")
        example = raw_example(tokenizer, text) if raw else chat_example(tokenizer, turns, tools)
        prompts.append(Prompt(with_prefix(example, prefix, tokenizer), text, location))
    if not prompts:
        raise UnmaskError(f"{file}: there is no prompt in it.")
    return prompts


def prompt_turns(
    record: Mapping[str, Any], location: str
) -> tuple[list[Turn], tuple[Mapping[str, Any], ...]]:
    """Read the turns of a record up to its last response, which it may lack, and its tools.

    Raises:
        UnmaskError: no known format fits, or a field cannot be used.
    """
    answer = {"role": "assistant", "content": MISSING}
    lists = [name for name in ("messages", "conversations") if isinstance(record.get(name), list)]
    for name in lists[:1]:
        turns = record[name]
        if not turns or _role(turns[-1]) != "assistant":
            record = {**record, name: [*turns, answer]}
    for name, answer_field in () if lists else _ANSWER_FIELDS.items():
        if record.get(name) is not None and not (record.get(answer_field) or record.get("response")):
            record = {**record, answer_field: [answer] if isinstance(record[name], list) else MISSING}
            break
    try:
        format = detect_format(record, location)
    except RecordError as error:
        raise UnmaskError(
            f"{location}: no known format has these fields: {', '.join(map(str, record))}; a prompt is read"
            " from instruction, prompt, messages or conversations; rename the field that has it."
        ) from error
    conversation = to_conversation(record, format, where=location)
    return list(conversation.turns[:-1]), conversation.tools


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> None:
    """Check that every prompt leaves room for its answer.

    Raises:
        UnmaskError: names the first prompt that does not.
    """
    for prompt in prompts:
        size = len(prompt.example.input_ids)
        if size + max_new_tokens > positions:
            raise UnmaskError(
                f"{prompt.location}: a prompt of {size} tokens and max_new_tokens = {max_new_tokens} need"
                f" more than the model's {positions} positions; shorten one of them."
            )


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The lines of a text file that are not blank, as records, with their locations."""
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        location = f"{path.name} line {number}"
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnmaskError(
                f"{location}: not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8."
            ) from error
        if text.strip():
            yield {"prompt": text}, location


def _role(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return "assistant"  # refused later, with its location
    name = message.get("role", message.get("from"))
    return ROLES.get(name) if isinstance(name, str) else None


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
    done = complete(model, tokenizer, examples, seed=list(seeds), advance=advance, **settings)
    return [
        {
            "response": prefix + completion.text,
            "tokens": len(completion.ids),
            "forwards": completion.num_forwards,
            "tokens_per_forward": round(completion.tokens_per_forward, 4),
        }
        for completion in done
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

    Raises:
        UnmaskError: `out` is of other prompts or settings.
    """
    head = {"settings": dict(settings or {})}
    heads: list[dict[str, Any]] = [
        {"index": index, "sample": sample, "seed": seed + sample, **head, "prompt": prompt.text}
        for index, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    totals = {"answers": 0, "tokens": 0, "forwards": 0}
    done, size = _read_answers(out, heads, totals) if resume and out.exists() else (0, 0)
    if advance is not None and done:
        advance(done)
    with out.open("r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        for start in range(done, len(heads), flush_every):
            batch = heads[start : start + flush_every]
            examples = [prompts[head["index"]].example for head in batch]
            answers = answer(examples, [head["seed"] for head in batch], advance)
            for head, fields in zip(batch, answers, strict=True):
                line = {**head, **fields}
                _count(line, totals)
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
    return totals


def check_out(out: Path, resume: bool) -> None:
    """Check that answers can be written, before the model is loaded.

    Raises:
        UnmaskError: the file exists and `resume` is False, or it cannot be written.
    """
    check_output_file(out, "--out")
    if out.exists() and not resume:
        raise UnmaskError(f"--out: {out} exists already; --resume continues it, or remove it.")


def _read_answers(out: Path, heads: Sequence[Mapping[str, Any]], totals: dict[str, int]) -> tuple[int, int]:
    """Count the complete lines of `out` and their bytes, after a check against the heads."""
    data = out.read_bytes()
    size = data.rfind(b"\n") + 1
    lines = data[:size].splitlines()
    if len(lines) > len(heads):
        raise UnmaskError(f"{out}: has {len(lines):,} answers, but there are {len(heads):,} to give.")
    for number, (text, head) in enumerate(zip(lines, heads, strict=False), 1):
        try:
            line = json.loads(text)
            old, new = ({**fields, **fields["settings"], "settings": None} for fields in (line, head))
            names = (*head, *line["settings"], *head["settings"])
            _count(line, totals)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise UnmaskError(f"{out} line {number}: is not an answer; remove the file.") from error
        for name in names:
            if old.get(name) != new.get(name):
                raise UnmaskError(
                    f"{out} line {number}: {name} is {old.get(name)!r}, now it would be {new.get(name)!r};"
                    " resume with the same prompts and settings, or write another file."
                )
    return len(lines), size


def _count(line: Mapping[str, Any], totals: dict[str, int]) -> None:
    totals["answers"] += 1
    totals["tokens"] += line.get("tokens", 0)
    totals["forwards"] += line.get("forwards", 0)
