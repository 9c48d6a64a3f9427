"""Options that several commands share, with their help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from typer import Argument, Option

from unmask.cli_complete import complete_from
from unmask.errors import UnmaskError

Model = Annotated[str, Argument(metavar="MODEL", help="Diffusion checkpoint: folder or hub name.")]
System = Annotated[str | None, Option(help="System prompt.")]
BatchSize = Annotated[int, Option(min=1, help="Batch size of a forward pass; does not change the answers.")]
EndFill = Annotated[
    int | None, Option(min=1, help="End tokens fill a response to a multiple of N, as in training.")
]

TEXTS = {"prompt", "system", "prefix", "suffix", "text", "stop", "choice"}  # options that a tokenizer reads

# As `unmask.generation` has them, which takes seconds to import.
PRESETS = (
    *("coda", "dream", "llada", "llada-blocks", "llada-1.5", "sdar", "sdar-dynamic", "fast-dllm-v2", "a2d"),
)
POLICIES = (
    *("maskgit_plus", "topk_margin", "entropy", "left_to_right", "random", "origin", "threshold", "factor"),
    *("entropy_bound", "remdm_cap", "remdm_rescale", "remdm_confidence"),
)

# Settings of `DiffusionGenerationConfig`: name -> type, smallest value, help.
DECODING: dict[str, tuple[type, int | None, str]] = {
    "preset": (
        str,
        None,
        f"Published settings: {', '.join(PRESETS)}; by default the checkpoint's own.",
    ),
    "max_new_tokens": (int, 1, "Length of the canvas, in tokens."),
    "min_new_tokens": (int, 0, "No end token among the first N tokens."),
    "steps": (int, 1, "Denoising steps at most; by default one per token."),
    "policy": (
        str,
        None,
        f"What to commit at each step: {POLICIES[0]} (the default), {', '.join(POLICIES[1:])}.",
    ),
    "threshold": (float, None, "Commit all tokens of at least this probability."),
    "factor": (float, None, "Of policy factor: higher commits more at once."),
    "entropy_bound": (float, None, "Of policy entropy_bound: nats per step."),
    "alg_temp": (float, None, "Randomness of the order of maskgit_plus, topk_margin or entropy."),
    "eta": (float, None, "Of the remdm policies: strength of remasking."),
    "temperature": (float, 0, "0 takes the most likely token; 1 samples from the model."),
    "top_k": (int, None, "Sample among the K most likely tokens."),
    "top_p": (float, None, "Sample among the fewest tokens of this probability."),
    "block_length": (int, None, "Complete blocks of N tokens one after another."),
    "sub_block_length": (int, None, "Within a block, complete N positions after another, left to right."),
    "first_token_alone": (bool, None, "Commit the first token of a block before the others."),
    "defer_end": (bool, None, "Commit end tokens last."),
    "canvas": (str, None, "fixed, or growing: the model sees no masks after the current block."),
    "guidance_scale": (
        float,
        None,
        "Classifier-free guidance against the masked prompt; doubles the forward passes.",
    ),
    "approximate_cache": (
        str,
        None,
        "prefix or dual: KV cache for bidirectional models; faster, other answers.",
    ),
    "seed": (int, None, "Random seed of sampling, 0 by default."),
}

CHOICES = {"preset": PRESETS, "policy": POLICIES, "canvas": ("fixed", "growing")}
CHOICES["approximate_cache"] = ("prefix", "dual")


def decoding_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option for each named setting to a command, which takes those given as its keyword `decoding`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = {name: values.pop(name) for name in names}
            for name in TEXTS.intersection(values):
                _check_text(name, values[name] or "")
            command(**values, decoding={name: x for name, x in settings.items() if x is not None})

        signature = inspect.signature(command, eval_str=True)
        parameters = [one for one in signature.parameters.values() if one.name != "decoding"]
        for name in names:
            kind, smallest, text = DECODING[name]
            option = Option(
                min=smallest,
                help=text,
                rich_help_panel="Decoding",
                autocompletion=complete_from(CHOICES.get(name)),
            )
            annotation = Annotated[kind | None, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _check_text(name: str, value: str | list[str]) -> None:
    """Refuse a value whose bytes are not UTF-8 text."""
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        raise UnmaskError(f"--{name}: not UTF-8 text (character {error.start + 1}).") from error


def refuse_unused(unused: bool, when: str, **options: Any) -> None:
    """Refuse options that were given and have no effect."""
    for name, value in options.items():
        if unused and value:
            raise UnmaskError(f"--{name.replace('_', '-')} has no effect {when}.")
