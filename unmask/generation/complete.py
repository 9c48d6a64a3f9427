"""Prompts -> completions as text, batched by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteriaList

from unmask.data.records import Turn
from unmask.data.encode import Encoder, Example
from unmask.data.encode import document_ids
from unmask.errors import UnmaskError
from unmask.generation.stop import StopTexts


@dataclass
class Completion:
    """What a model wrote, and how; the lists that follow `ids` have an entry for each of them."""

    text: str
    """Without special tokens, and up to a stop text."""
    ids: list[int]
    """The end token included."""
    commit_step: list[int]
    """Step, from 0, that committed each token."""
    confidence: list[float] = field(default_factory=list)
    """The model's probability of each token when it was committed."""
    entropy: list[float] = field(default_factory=list)
    """Nats, there and then."""
    forwards: int = 0
    states: list[list[int]] = field(default_factory=list)
    """The whole canvas after each step; empty unless asked for."""

    @property
    def figures(self) -> str:
        """Tokens and forwards, for people."""
        tokens, forwards = len(self.ids), self.forwards
        return f"{tokens} token{'s' * (tokens != 1)} in {forwards} forward{'s' * (forwards != 1)}"

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the response, the end token included, over forwards."""
        return len(self.ids) / max(1, self.forwards)


def chat_example(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Any] = ()
) -> Example:
    """Lay turns out as the checkpoint's chat template does, up to where the next answer starts.

    Raises:
        UnmaskError: the tokenizer has no chat template, or the template refuses the turns.
    """
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; give the prompt as it is (--raw).")
    return Encoder(tokenizer, layout="chat").prompt_example(turns, tools)


def chat_turns(user: str, system: str | None = None) -> list[Turn]:
    """Make the turns of a question."""
    turns = [Turn("user", user)]
    return turns if system is None else [Turn("system", system), *turns]


def raw_example(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Encode the beginning of a plain text; special-token strings in it are text, as in training."""
    ids = document_ids(text, tokenizer)
    return Example(ids, [False] * len(ids))


def begun(example: Example, text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return the prompt with `text` after it as the beginning of the response."""
    more = raw_example(tokenizer, text)
    return Example(example.input_ids + more.input_ids, example.src_mask + more.src_mask)


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

    Prompts of like length are generated together, which changes the time and not the answers.

    Args:
        prompts: token ids, all of them source; or examples, of which `src_mask` says what training would
            mask, such as earlier responses (it matters to block-causal models).
        batch_size: prompts in one forward.
        stop: texts that end a response, which ends before them.
        keep_states: also return the canvas after each step.
        advance: told the number of prompts done after each batch.
        **settings: fields of `DiffusionGenerationConfig`, `seed` one number or one for each prompt; or a
            `streamer`, for a single prompt.
    """
    examples = [p if isinstance(p, Example) else Example(p, [True] * len(p)) for p in prompts]
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    seeds = settings.pop("seed", None)
    stops = StopTexts(tokenizer, stop)
    if stop:
        settings["stopping_criteria"] = StoppingCriteriaList([stops])
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        if seeds is not None:
            settings["seed"] = [seeds[i] for i in chosen] if isinstance(seeds, Sequence) else seeds
        tensors = _left_padded([examples[i] for i in chosen], model.device)
        input_ids, attention_mask, src_mask = tensors
        output = model.generate(input_ids, attention_mask, src_mask=src_mask, return_trace=True, **settings)
        for row, index in enumerate(chosen):
            kept = output.commit_step[row] >= 0
            ids = output.sequences[row, input_ids.shape[1] :][kept].tolist()
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            completions[index] = Completion(
                text if (cut := stops.cut(text)) is None else cut,
                ids,
                output.commit_step[row, kept].tolist(),
                output.confidence[row, kept].tolist(),
                output.entropy[row, kept].tolist(),
                int(output.num_forwards[row]),
                _until_still(output.states[row].tolist()) if keep_states else [],
            )
        if advance is not None:
            advance(len(chosen))
    return [completions[index] for index in range(len(prompts))]


def _until_still(states: list[list[int]]) -> list[list[int]]:
    """Without the repeated last state of a row that took fewer steps than others of its batch."""
    count = len(states)
    while count > 1 and states[count - 1] == states[count - 2]:
        count -= 1
    return states[:count]


def _left_padded(rows: list[Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and source mask of prompts that end together."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, source = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        if row.input_ids:
            ids[index, -len(row.input_ids) :] = torch.tensor(row.input_ids)
            mask[index, -len(row.input_ids) :] = True
            source[index, -len(row.input_ids) :] = torch.tensor(row.src_mask)
    return ids.to(device), mask.to(device), source.to(device)
