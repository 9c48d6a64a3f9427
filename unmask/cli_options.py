"""Options that several commands share, with their help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from typer import Argument, Option

from unmask.errors import UnmaskError

Model = Annotated[str, Argument(metavar="MODEL", help="Diffusion checkpoint: folder or hub name.")]
System = Annotated[str | None, Option(help="System prompt.")]
BatchSize = Annotated[int, Option(min=1, help="Batch size of a forward pass; does not change the answers.")]
EndFill = Annotated[
    int | None, Option(min=1, help="End tokens fill a response to a multiple of N, as in training.")
]

# Settings of `DiffusionGenerationConfig`: name -> type, smallest value, help.
DECODING: dict[str, tuple[type, int | None, str]] = {
    "max_new_tokens": (int, 1, "Length of the canvas, in tokens."),
    "min_new_tokens": (int, 0, "No end token among the first N tokens."),
    "steps": (int, 1, "Denoising steps at most; by default one per token."),
    "policy": (
        str,
        None,
        "What to commit at each step: maskgit_plus (the default), topk_margin, entropy, left_to_right,"
        " random, origin, threshold, factor, entropy_bound, remdm_cap, remdm_rescale, remdm_confidence.",
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


def decoding_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option for each named setting to a command.

    The command takes the settings that were given as its keyword `decoding`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = {name: values.pop(name) for name in names}
            for name, value in settings.items():
                if value != value:  # NaN, that not every version of click refuses
                    raise UnmaskError(f"--{name.replace('_', '-')}: expected a number; got nan.")
            command(**values, decoding={name: x for name, x in settings.items() if x is not None})

        hints = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != "decoding"
        ]
        for name in names:
            kind, smallest, text = DECODING[name]
            option = Option(min=smallest, help=text, rich_help_panel="Decoding")
            annotation = Annotated[kind | None, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
