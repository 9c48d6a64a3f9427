"""Options that several commands share, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

_DECODING = "Decoding"  # their panel in the help

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Diffusion checkpoint: folder or hub name.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Plain text, without the chat template.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Length of the canvas, in tokens.", rich_help_panel=_DECODING),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option(min=0, help="No end token among the first N tokens.", rich_help_panel=_DECODING),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Forwards at most; by default one a token.", rich_help_panel=_DECODING),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        help="What to commit at each step: maskgit_plus (the default), topk_margin, entropy, left_to_right,"
        " random, origin, threshold, factor, entropy_bound, remdm_cap, remdm_rescale, remdm_confidence.",
        rich_help_panel=_DECODING,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Commit all tokens of at least this probability.", rich_help_panel=_DECODING),
]
Factor = Annotated[
    float | None,
    typer.Option(help="Of policy factor: higher commits more at once.", rich_help_panel=_DECODING),
]
EntropyBound = Annotated[
    float | None,
    typer.Option(help="Of policy entropy_bound: nats risked at a step.", rich_help_panel=_DECODING),
]
AlgTemp = Annotated[
    float | None,
    typer.Option(
        help="Randomness of the order of maskgit_plus, topk_margin or entropy.", rich_help_panel=_DECODING
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(help="Of the remdm policies: strength of remasking.", rich_help_panel=_DECODING),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0, help="0 takes the most likely token; 1 samples from the model.", rich_help_panel=_DECODING
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Sample among the K most likely tokens.", rich_help_panel=_DECODING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample among the fewest tokens of this probability.", rich_help_panel=_DECODING),
]
BlockLength = Annotated[
    int | None,
    typer.Option(help="Finish blocks of N tokens one after another.", rich_help_panel=_DECODING),
]
Canvas = Annotated[
    str | None,
    typer.Option(
        help="fixed, or growing: the model sees no masks after the current block.",
        rich_help_panel=_DECODING,
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free guidance against the prompt masked; doubles the forwards.",
        rich_help_panel=_DECODING,
    ),
]
ApproximateCache = Annotated[
    str | None,
    typer.Option(
        help="prefix or dual: keep keys and values in a block; faster, other answers.",
        rich_help_panel=_DECODING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the sampling, 0 by default: another gives another text.", rich_help_panel=_DECODING
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Answers in one forward, 16 by default; changes none.")
]
EndFill = Annotated[
    int | None,
    typer.Option(min=1, help="End tokens fill a response to a multiple of N, as in training."),
]
