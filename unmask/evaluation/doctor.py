"""What a checkpoint is, what was assumed of it, and whether it reads a text as its config says."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import requires, version
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.data.encode import Encoder
from unmask.data.records import Turn
from unmask.data.tokenizer import check_vocabulary, load_tokenizer
from unmask.errors import UnmaskError, UnmaskNote
from unmask.formats import PREFIX
from unmask.model.checkpoint import is_adapter, load_model
from unmask.model.config import describe_attention
from unmask.progress import Bar

TEXT = (
    "The harbour was quiet in the early morning. A man carried two baskets of fish from his boat to the market,"
    " where the first people of the town were already waiting. When the sun came up, the water turned from grey to"
    " green, and the bells of the old church began to ring. Nobody in the street was in a hurry. The baker opened"
    " his door and put a table in front of it, with bread, butter and a pot of coffee. It was a warm day in June."
)
EVERY = 5  # tokens, one of which is masked: each once, in so many rows
BLOCK_LENGTH = 32  # of the block-causal reading of a model that says it is bidirectional
SIGNIFICANT = 4.0  # standard errors by which another reading must be better


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    is_off: bool = False
    hint: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Reading:
    """Nats of masked tokens of `TEXT` under one assumption."""

    name: str
    nats: float  # per masked token
    gain: float  # nats per token by which it is better than what the config says
    stderr: float  # of the gain, over the tokens


def diagnose(name: str) -> list[Finding]:
    """Open a checkpoint and check it: format, sizes, tokens, template, versions, and how it reads a text.

    Args:
        name: folder or hub name of a diffusion checkpoint, ours or of another system.

    Raises:
        UnmaskError: it cannot be opened at all.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model: Any = load_model(name)
    notes = [str(one.message) for one in said if issubclass(one.category, UnmaskNote)]
    config, size = model.config, model.num_parameters()
    found = [
        Finding("opened as", notes[0].split("opened as ")[1].rstrip(".") if notes else "unmask checkpoint"),
        Finding("decoder", f"{config.model_type.removeprefix(PREFIX)}, {size:,} parameters, {model.dtype}"),
        Finding(
            "sizes",
            f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads,"
            f" {config.num_key_value_heads} for keys, {config.vocab_size:,} rows,"
            f" {config.max_position_embeddings:,} positions",
        ),
        Finding("embedding and head", "tied" if config.tie_word_embeddings else "untied"),
        Finding("attention and shift", describe_attention(config)),
    ]
    if is_adapter(name):
        found.append(Finding("adapters", "LoRA, not merged"))
    try:
        tokenizer = load_tokenizer(name)
        found += _tokens(name, model, tokenizer)
        found += _template(model, tokenizer)
        if not any(one.is_off for one in found):
            found += _reading(model, tokenizer)
    except UnmaskError as error:
        found.append(Finding("tokenizer", str(error), is_off=True))
    return [*found, *_versions()]


def _tokens(name: str, model: Any, tokenizer: Any) -> Iterator[Finding]:
    config, settings = model.config, model.generation_config
    try:
        check_vocabulary(tokenizer, config, name)
        yield Finding("tokenizer", f"{len(tokenizer):,} tokens in {config.vocab_size:,} rows")
    except UnmaskError as error:
        yield Finding("tokenizer", str(error), is_off=True)
        return
    mask = config.mask_token_id
    if mask is None:
        yield Finding("mask token", "none", is_off=True, hint="make one with `unmask convert`")
    else:
        yield Finding("mask token", f"{mask} {tokenizer.convert_ids_to_tokens(mask)}")
    ends = settings.eos_token_ids
    told = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in ends)
    hint = "" if ends else "set eos_token_id in generation_config.json: responses would never end"
    yield Finding("end tokens", told or "none", is_off=not ends, hint=hint)
    pad = tokenizer.pad_token_id
    yield Finding("padding", "none" if pad is None else f"{pad} {tokenizer.pad_token}")


def _template(model: Any, tokenizer: Any) -> Iterator[Finding]:
    if not tokenizer.chat_template:
        yield Finding("chat template", "none: prompts are plain text (--raw)")
        return
    try:
        encoder = Encoder(tokenizer, layout="chat")
        prompt = encoder.prompt_example([Turn("user", "Hello")]).input_ids
    except UnmaskError as error:
        yield Finding("chat template", str(error), is_off=True)
        return
    end = encoder.end_token_id
    ends = end in model.generation_config.eos_token_ids
    told = (
        f"a prompt of {len(prompt)} tokens; responses end with {end} {tokenizer.convert_ids_to_tokens(end)}"
    )
    hint = (
        "" if ends else "which generation does not stop at: add it to eos_token_id in generation_config.json"
    )
    yield Finding("chat template", told, is_off=not ends, hint=hint)


def _reading(model: Any, tokenizer: Any) -> Iterator[Finding]:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][: model.config.max_position_embeddings]
    readings, guess = (
        compare_readings(model, torch.tensor([ids])),
        math.log(model.config.vocab_size),
    )
    own, *others = readings
    told = f"{own.nats:.3f} nats a masked token of an English text (a guess: {guess:.2f})"
    yield Finding("as its config says", told, own.nats > guess, hint="worse than guessing: is it trained?")
    for one in others:
        better = one.gain > max(0.05, SIGNIFICANT * one.stderr) and one.nats < guess - 0.1
        yield Finding(
            f"read {one.name}",
            f"{one.nats:.3f} nats",
            better,
            hint=f"it reads the text better by {one.gain:.2f} nats: is its config right?",
        )


@torch.no_grad()
def compare_readings(model: Any, ids: torch.Tensor) -> list[Reading]:
    """Compare what the config says with the other shift and the other attention, on masked tokens of a text.

    Args:
        ids: a text (1, L). Every fifth token is masked, in five rows, so that each is once.

    Returns:
        The config's own reading first.
    """
    config = model.config
    rows = torch.arange(EVERY)[:, None]
    is_masked = (torch.arange(ids.shape[1]) % EVERY == rows).to(model.device)
    batch = ids.expand(EVERY, -1).to(model.device)
    causal = config.attention == "block_causal"
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "unshifted" if config.logit_shift else "shifted": {"logit_shift": not config.logit_shift},
        "bidirectional" if causal else f"block-causal (blocks of {BLOCK_LENGTH})": {
            "attention": "bidirectional" if causal else "block_causal",
            "block_length": None if causal else BLOCK_LENGTH,
        },
    }
    model.eval()
    nats = {}
    with Bar("reading a text", len(changes), "ways") as bar:
        for name, change in bar.over(changes.items()):
            before = {key: getattr(config, key) for key in change}
            try:
                for key, value in change.items():
                    setattr(config, key, value)
                nats[name] = model.masked_nll(batch, is_masked).double().cpu()
            finally:
                for key, value in before.items():
                    setattr(config, key, value)
    gains = {name: nats[""] - values for name, values in nats.items()}
    return [
        Reading(
            name,
            values.mean().item(),
            gains[name].mean().item(),
            (gains[name].std() / len(values) ** 0.5).item(),
        )
        for name, values in nats.items()
    ]


def _versions() -> Iterator[Finding]:
    """The versions of the libraries, and whether they are among those that unmask is tested with."""
    yield Finding("python", platform.python_version())
    for text in requires("unmask") or ():
        needed = Requirement(text)
        if needed.marker is None and needed.name in (
            "torch",
            "transformers",
            "tokenizers",
            "safetensors",
            "peft",
        ):
            found = version(needed.name)
            fits = needed.specifier.contains(found, prereleases=True)
            yield Finding(needed.name, found, not fits, hint=f"unmask is tested with {needed.specifier}")


def show(findings: list[Finding], *, as_json: bool = False) -> None:
    """Print a report."""
    if as_json:
        print(json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    for one in findings:
        hint = Text(f"\n{one.hint}" if one.is_off and one.hint else "", style="red")
        mark = Text("off", style="bold red") if one.is_off else Text("ok", style="green")
        table.add_row(mark, Text(one.name), Text(one.value) + hint)
    Console().print(table)


def has_faults(findings: list[Finding]) -> bool:
    """Whether something is off."""
    return any(one.is_off for one in findings)
