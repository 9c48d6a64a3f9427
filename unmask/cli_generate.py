"""The commands that write text: `unmask generate`, `unmask chat` and `unmask infill`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unmask.cli_options import (
    AlgTemp,
    ApproximateCache,
    BatchSize,
    BlockLength,
    Canvas,
    EndFill,
    EntropyBound,
    Eta,
    Factor,
    GuidanceScale,
    MaxNewTokens,
    MinNewTokens,
    Model,
    PolicyName,
    Raw,
    Seed,
    Steps,
    System,
    Temperature,
    Threshold,
    TopK,
    TopP,
)
from unmask.errors import UnmaskError

IN_TERMINAL = "-"  # what --trace alone stands for
_TRACES = (".html", ".png")

_ALL = (
    *("max_new_tokens", "min_new_tokens", "steps", "policy", "threshold", "factor", "entropy_bound"),
    *("alg_temp", "eta", "temperature", "top_k", "top_p", "block_length", "canvas", "guidance_scale"),
    "approximate_cache",
)


def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What the user says; - reads it from the standard input, without its last line end."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: records of any known format, or .txt, one a line."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answers to --prompts, one JSON line each.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the answers that --out already holds.")
    ] = False,
    system: System = None,
    raw: Raw = False,
    prefix: Annotated[str | None, typer.Option(help="What the response starts with.")] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(help="Answer by the likeliest of these texts; give two or more."),
    ] = None,
    end_fill: EndFill = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Answers to each prompt, from one seed after another.")
    ] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the response before this text; may be repeated.")
    ] = None,
    batch_size: BatchSize = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE]",
            help="Show tokens appearing out of masks: here, as a page (.html) or a picture (.png).",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    steps: Steps = None,
    policy: PolicyName = None,
    threshold: Threshold = None,
    factor: Factor = None,
    entropy_bound: EntropyBound = None,
    alg_temp: AlgTemp = None,
    eta: Eta = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    block_length: BlockLength = None,
    canvas: Canvas = None,
    guidance_scale: GuidanceScale = None,
    approximate_cache: ApproximateCache = None,
    seed: Seed = None,
) -> None:
    """Answer a prompt, or a file of them: fill a canvas of masks step by step.

    By default the most confident token comes first, one a forward. With
    --choice nothing is written: the given answers are compared by likelihood.
    """
    values = locals()
    decoding = {name: values[name] for name in _ALL if values[name] is not None}
    if (prompt is None) == (prompts is None):
        raise UnmaskError("give --prompt TEXT or --prompts FILE, one of them.")
    if prompts is not None and out is None:
        raise UnmaskError("--prompts needs --out FILE.jsonl for the answers.")
    if prompts is not None and trace is not None:
        raise UnmaskError("--trace has an effect with --prompt alone.")
    for option, given in (("--out", out is not None), ("--resume", resume)):
        if given and prompts is None:
            raise UnmaskError(f"{option} has an effect with --prompts alone.")
    if raw and system is not None:
        raise UnmaskError("--system has no effect with --raw; write it into the prompt.")
    if end_fill is not None and not choice:
        raise UnmaskError("--end-fill has an effect with --choice alone.")
    if choice:
        others = {"prefix": prefix, "stop": stop, "trace": trace, "samples": samples > 1, **decoding}
        for name, given in others.items():
            if given or name in decoding:
                raise UnmaskError(
                    f"--{name.replace('_', '-')} has no effect with --choice: nothing is written."
                )
    _check_texts(prompt=prompt, system=system, prefix=prefix, stop=stop, choice=choice)
    _check_trace(trace)

    hide_progress_bars()
    from unmask.evaluation.choose import chosen
    from unmask.generation.complete import begun, chat_example, chat_turns, complete, raw_example
    from unmask.generation.prompts import answer_file, check_lengths, check_out, generated, read_prompts

    if out is not None:
        check_out(out, resume)
    denoiser, tokenizer = _load(model)
    config = _settings(denoiser, decoding, seed)
    if samples > 1 and not config.is_random:
        raise UnmaskError("--samples: without randomness all are the same; set --temperature above 0.")
    size, prefix = batch_size or 16, prefix or ""
    if choice:
        answer = chosen(denoiser, tokenizer, choice, end_fill=end_fill or 1, batch_size=size)
    else:
        answer = generated(denoiser, tokenizer, prefix=prefix, stop=stop or [], batch_size=size, **decoding)
    if prompts is not None and out is not None:
        found = read_prompts(prompts, tokenizer, raw=raw, system=system)
        found = [replace(one, example=begun(one.example, prefix, tokenizer)) for one in found]
        if not choice:
            check_lengths(found, config.max_new_tokens, denoiser.config.max_position_embeddings)
        told = {"model": model, "raw": raw or None, "system": system, "prefix": prefix or None}
        told |= {"choice": choice or None, "end_fill": end_fill, "stop": stop or None, **decoding}
        run = partial(answer_file, answer, found, out, samples=samples, seed=config.seed, resume=resume)
        settings = {name: value for name, value in told.items() if value is not None}
        _answer_file(partial(run, settings=settings, together=4 * size), out, len(found), samples)
        return
    text = _read_stdin() if prompt == "-" else prompt or ""
    if not text.strip() and not raw:
        raise UnmaskError("the prompt is empty; say something, or generate from nothing with --raw.")
    example = raw_example(tokenizer, text) if raw else chat_example(tokenizer, chat_turns(text, system))
    example = begun(example, prefix, tokenizer)
    if choice:
        [line] = answer([example], [config.seed], None)
        for name, figures in line["choices"].items():
            print(f"{figures['probability']:6.1%}  {figures['nats']:.3f} nats  {name}", file=sys.stderr)
        print(line["response"])
        return
    seeds = [config.seed + sample for sample in range(samples)]
    decoding |= {"stop": stop or [], "batch_size": size, "seed": seeds}
    keep = trace not in (None, IN_TERMINAL)
    asked = text + ("\n" if prefix and not raw else "") + prefix
    answers = complete(denoiser, tokenizer, [example] * samples, keep_states=keep, **decoding)
    _show_trace(trace, answers, tokenizer, title=f"unmask generate {model}", prompt=asked, seeds=seeds)
    for number, one in zip(seeds, answers, strict=True):
        if samples > 1:
            print(f"--- seed {number}")
        print(prefix + one.text)


def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    steps: Steps = None,
    policy: PolicyName = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Talk with a model: tokens appear out of masks and settle.

    /reset forgets the conversation, /quit ends it, Ctrl-C stops an answer.
    """
    names = ("max_new_tokens", "steps", "policy", "threshold", "temperature", "top_p", "seed")
    values = locals()
    decoding = {name: values[name] for name in names if values[name] is not None}
    _check_texts(system=system)
    hide_progress_bars()
    from unmask.generation.chat import chat as run

    denoiser, tokenizer = _load(model)
    _settings(denoiser, decoding, None)
    console = Console()
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  gives the prompt its history and line editing

    def ask() -> str:
        return input("> " if interactive else "")

    run(denoiser, tokenizer, ask=ask, console=console, system=system, **decoding)


def infill(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text with gaps: [\\[gap:5]], or [\\[gap:2-8]]; - reads it from the standard input, without"
            " its last line end."
        ),
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="What stands before the only gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="What stands after the only gap.")] = None,
    length: Annotated[
        str | None,
        typer.Option(metavar="N or N-M", help="Tokens between --prefix and --suffix, or a range to try."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the user says, if the text is the answer to it.")
    ] = None,
    end_fill: EndFill = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Lengths tried in one forward, 16 by default.")
    ] = None,
    steps: Steps = None,
    policy: PolicyName = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Fill the gaps of a text, given what stands before and after them.

    Of a gap such as [\\[gap:2-8]] every length is tried, and the likeliest text
    wins. A backslash before it makes it plain text. Needs a bidirectional
    model.
    """
    names = ("steps", "policy", "threshold", "temperature", "top_p", "seed")
    values = locals()
    decoding = {name: values[name] for name in names if values[name] is not None}
    around = prefix is not None or suffix is not None
    if (text is None) == (not around):
        raise UnmaskError("give --text with gaps in it, or --prefix and --suffix with --length.")
    if around and length is None:
        raise UnmaskError("--prefix and --suffix need --length, the tokens between them: 5, or 2-8.")
    if text is not None and length is not None:
        raise UnmaskError("--length has no effect with --text; write [[gap:5]] into it.")
    if end_fill is not None and prompt is None:
        raise UnmaskError("--end-fill has an effect with --prompt alone.")
    _check_texts(text=text, prefix=prefix, suffix=suffix, prompt=prompt)
    hide_progress_bars()
    from unmask.data.encode import Encoder
    from unmask.generation.complete import chat_example, chat_turns
    from unmask.generation.infill import infill_text, parse_gaps, parse_length

    if text is not None:
        parts = parse_gaps(_read_stdin() if text == "-" else text)
    else:
        pieces = [prefix or "", parse_length(length or ""), suffix or ""]
        parts = [piece for piece in pieces if piece != ""]
    denoiser, tokenizer = _load(model)
    answer_to: dict[str, Any] = {}
    if prompt is not None:
        if not prompt.strip():
            raise UnmaskError("the prompt is empty; say something, or leave --prompt out.")
        end = Encoder(tokenizer, layout="chat").end_token_id
        answer_to = {"before": chat_example(tokenizer, chat_turns(prompt)), "end": end}
    done = infill_text(
        denoiser,
        tokenizer,
        parts,
        **answer_to,
        end_fill=end_fill or 1,
        batch_size=batch_size or 16,
        **decoding,
    )
    counts = ", ".join(map(str, done.lengths))
    print(
        f"gaps of {counts} tokens, log-probability {done.log_probability:.3f} nats,"
        f" {done.forwards} forwards; lengths tried: {len(done.tried)}",
        file=sys.stderr,
    )
    print(done.text)


def place_of_trace(arguments: Sequence[str]) -> list[str]:
    """Let --trace stand alone: a file may follow it, and Typer knows no option that may lack its value."""
    placed: list[str] = []
    for place, argument in enumerate(arguments):
        placed.append(argument)
        following = Path("".join(arguments[place + 1 : place + 2]))
        # Any other file is left to be refused by name; what comes after may also be the model.
        is_file = following.suffix[1:].isalpha() and not str(following).startswith("-")
        if argument == "--trace" and (not is_file or following.is_dir()):
            placed.append(IN_TERMINAL)
    return placed


def hide_progress_bars() -> None:
    """Keep the bars of transformers, of loading and of writing weights, from between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load(name: str) -> tuple[Any, Any]:
    """The model, on the accelerator if there is one, and its tokenizer."""
    from unmask.data.tokenizer import load_tokenizer
    from unmask.model.bf16 import place_for_inference
    from unmask.model.checkpoint import load_model

    model = load_model(name)
    place_for_inference(model)
    return model, load_tokenizer(name)


def _settings(model: Any, decoding: dict[str, Any], seed: int | None) -> Any:
    """The model's settings with those given, checked before the work."""
    import copy

    config = copy.deepcopy(model.generation_config)
    config.set(**decoding, **({} if seed is None else {"seed": seed}))
    return config


def _check_texts(**options: str | list[str] | None) -> None:
    """Refuse what a shell passed on as bytes that are no text."""
    for name, value in options.items():
        for text in [value] if isinstance(value, str) else value or []:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UnmaskError(f"--{name}: not UTF-8 text (character {error.start + 1}).") from error
            if name == "stop" and not text:
                raise UnmaskError("--stop: a stop text must not be empty.")


def _check_trace(trace: str | None) -> None:
    if trace is None or trace == IN_TERMINAL:
        return
    file = Path(trace)
    if not trace.lower().endswith(_TRACES):
        raise UnmaskError(f"--trace: expected a file .html or .png, or nothing; got {trace!r}.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UnmaskError(f"--trace: {file} cannot be written: there must be a folder {file.parent} for it.")


def _read_stdin() -> str:
    """The standard input as text, without its last line end."""
    try:
        # From the bytes: in some locales Python lets through what is no text.
        text = sys.stdin.buffer.read().decode() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    except UnicodeDecodeError as error:
        line = bytes(error.object).count(b"\n", 0, error.start) + 1
        raise UnmaskError(f"standard input: not UTF-8 text (line {line}); save it as UTF-8.") from error


def _show_trace(
    trace: str | None, answers: list[Any], tokenizer: Any, *, title: str, prompt: str, seeds: list[int]
) -> None:
    if trace is None:
        return
    names = [f"seed {seed}" for seed in seeds]
    if trace == IN_TERMINAL:
        from unmask.generation.trace import trace_lines

        console = Console(stderr=True)
        for answer in answers:
            for line in trace_lines(answer.ids, answer.commit_step, tokenizer):
                console.print(line)
    elif trace.lower().endswith(".html"):
        from unmask.generation.trace_page import write_trace_page

        write_trace_page(Path(trace), answers, tokenizer, title=title, prompt=prompt, names=names)
    else:
        from unmask.generation.trace_plot import draw_trace

        draw_trace(Path(trace), answers, tokenizer, title=title, names=names)


def _answer_file(run: Callable[..., dict[str, int]], out: Path, prompts: int, samples: int) -> None:
    """Answer a file with a progress bar, and say what was done."""
    console = Console(stderr=True)
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering", total=prompts * samples)
        try:
            totals = run(advance=lambda count: progress.advance(task, count))
        except KeyboardInterrupt:
            progress.stop()
            print(f"interrupted; --resume goes on with what {out} holds", file=sys.stderr)
            raise typer.Exit(130) from None
    line = f"{out}: {totals['answers']:,} answers to {prompts:,} prompts"
    if totals["forwards"]:
        share = totals["tokens"] / totals["forwards"]
        line += f", {totals['tokens']:,} tokens in {totals['forwards']:,} forwards ({share:.2f} a forward)"
    print(line)
