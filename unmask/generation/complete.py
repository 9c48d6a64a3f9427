"""Token ids of prompts -> completions as text, batched by length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unmask.data.conversation import Turn
from unmask.data.encode import Encoder
from unmask.errors import UnmaskError


@dataclass
class Completion:
    """What a model wrote: text without special tokens, its ids, and the step that committed each."""

    text: str
    ids: list[int]
    commit_step: list[int]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, user: str, system: str | None = None) -> list[int]:
    """Lay out what a user says as the checkpoint's chat template does, up to where the answer starts.

    Raises:
        UnmaskError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UnmaskError("the tokenizer has no chat template; give the prompt as it is (--raw).")
    turns = [Turn("user", user)] if system is None else [Turn("system", system), Turn("user", user)]
    return Encoder(tokenizer, layout="chat").encode_prompt(turns)


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Generate a completion of every prompt, given as token ids.

    Prompts of like length are generated together, which changes the time and not the answers.

    Args:
        batch_size: prompts in one forward.
        advance: told the number of prompts done after each batch.
        **settings: fields of `DiffusionGenerationConfig`.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids, attention_mask = _left_padded([prompts[i] for i in chosen], model.device)
        output = model.generate(input_ids, attention_mask, return_trace=True, **settings)
        for row, index in enumerate(chosen):
            steps = output.commit_step[row]
            ids = output.sequences[row, input_ids.shape[1] :][steps >= 0].tolist()
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            completions[index] = Completion(text, ids, steps[steps >= 0].tolist())
        if advance is not None:
            advance(len(chosen))
    return [completions[index] for index in range(len(prompts))]


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        if row:
            ids[index, -len(row) :] = torch.tensor(row)
            mask[index, -len(row) :] = True
    return ids.to(device), mask.to(device)
