"""The commands that write text: `unmask generate`, `unmask chat` and `unmask infill`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from unmask.cli_options import DECODING, BatchSize, EndFill, Model, System, decoding_options, refuse_unused
from unmask.errors import UnmaskError
from unmask.progress import Bar

LARGE = 2 << 30  # bytes of weights from which on reading them takes long
IN_TERMINAL = "-"  # what --trace alone means
PICTURES = (".html", ".png")
STDIN = "- reads standard input, without its last line end"


@decoding_options(*DECODING)
def generate(
    model: Model,
    prompt: Annotated[str | None, Option(help=f"What the user says; {STDIN}.")] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Prompts: records, or .txt, one a line.")
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="Answers to --prompts, one JSON line each.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted --out.")] = False,
    system: System = None,
    raw: Annotated[bool, Option("--raw", help="Plain text, without the chat template.")] = False,
    prefix: Annotated[str, Option(help="Beginning of the response.", show_default=False)] = "",
    choice: Annotated[
        list[str] | None, Option(help="Answer with the likeliest of these; two or more.")
    ] = None,
    end_fill: EndFill = None,
    samples: Annotated[int, Option(min=1, help="Answers to each prompt, with seed, seed + 1, ...")] = 1,
    stop: Annotated[
        list[str] | None, Option(help="Stop string: ends the response before it; repeatable.")
    ] = None,
    batch_size: BatchSize = 16,
    trace: Annotated[
        str | None,
        Option(
            metavar="[FILE]", help="Show masks becoming tokens: here, in a page (.html) or picture (.png)."
        ),
    ] = None,
    *,
    decoding: dict[str, Any],
) -> None:
    """Answer a prompt, or a file of them: fill a canvas of masks step by step.

    By default each denoising step commits the most confident token. With
    --choice nothing is generated: the given answers are compared by likelihood.
    A file on several devices: torchrun --nproc_per_node=N -m unmask generate ...
    """
    if (prompt is None) == (prompts is None):
        raise UnmaskError("give --prompt TEXT or --prompts FILE, one of them.")
    if prompts is not None and out is None:
        raise UnmaskError("--prompts needs --out FILE.jsonl for the answers.")
    generating = {"prefix": prefix, "stop": stop, "trace": trace, "samples": samples > 1}
    generating |= {name: True for name in decoding if name != "seed"}
    refuse_unused(prompts is not None, "with --prompts", trace=trace)
    refuse_unused(prompts is None, "without --prompts", out=out, resume=resume)
    refuse_unused(raw, "with --raw; write it into the prompt", system=system)
    refuse_unused(not choice, "without --choice", end_fill=end_fill)
    refuse_unused(bool(choice), "with --choice: nothing is generated", **generating)
    from unmask.evaluation.choose import choose_answers
    from unmask.generation.answer_file import generate_answers
    from unmask.generation.prompts import prompt_example, read_prompts
    from unmask.generation.text import complete
    from unmask.io import check_output_file

    if trace not in (None, IN_TERMINAL):
        if not trace.lower().endswith(PICTURES):
            raise UnmaskError(f"--trace: expected a file .html or .png, or nothing; got {trace!r}.")
        check_output_file(Path(trace), "--trace")
    if out is not None:
        check_output_file(out, "--out")
        if out.exists() and not resume:
            raise UnmaskError(f"--out: {out} exists already; --resume continues it, or remove it.")
    if prompts is not None:
        from unmask.processes import join

        join()
    denoiser, tokenizer, config = _load(model, decoding)
    seed = decoding.pop("seed", config.seed)
    if samples > 1 and not config.is_random:
        raise UnmaskError("--samples: without randomness all are the same; set --temperature above 0.")
    generation: dict[str, Any] = {"stop": stop or [], "batch_size": batch_size, **decoding}
    answer = partial(generate_answers, denoiser, tokenizer, prefix=prefix, **generation)
    if choice:
        sizes = {"end_fill": end_fill or 1, "batch_size": batch_size}
        answer = partial(choose_answers, denoiser, tokenizer, choice, **sizes)
    asked: dict[str, Any] = {"raw": raw, "system": system, "prefix": prefix, "to_answer": bool(choice)}
    if prompts is not None and out is not None:
        longest = None if choice else denoiser.config.max_position_embeddings - config.max_new_tokens
        listed = read_prompts(prompts, tokenizer, longest=longest, **asked)
        told = {"model": model, "raw": raw, "system": system, "prefix": prefix, "choice": choice}
        told |= {"end_fill": end_fill, "stop": stop}
        settings = {name: value for name, value in told.items() if value} | decoding
        _answer_file(answer, listed, out, settings=settings, samples=samples, seed=seed, resume=resume)
        return
    text = read_stdin() if prompt == "-" else prompt or ""
    example = prompt_example(tokenizer, text, **asked)
    if choice:
        [(_, line)] = answer([example], [seed])
        for name, figures in line["choices"].items():
            print(f"{figures['probability']:6.1%}  {figures['nats']:.3f} nats  {name}", file=sys.stderr)
        print(line["response"])
        return
    seeds = [seed + sample for sample in range(samples)]
    keep = trace not in (None, IN_TERMINAL)
    with Bar("denoising", samples * config.max_new_tokens, "tokens") as advance:
        generation |= {"keep_states": keep, "watch": lambda event: advance(len(event.positions))}
        answers = complete(denoiser, tokenizer, [example] * samples, seed=seeds, **generation)
    if trace is not None:
        names = [f"seed {number}" for number in seeds]
        shown = text + ("\n" if prefix and not raw else "") + prefix
        _show_trace(trace, answers, tokenizer, f"unmask generate {model}", shown, names)
    for number, completion in zip(seeds, answers, strict=True):
        if samples > 1:
            print(f"--- seed {number}")
        print(prefix + completion.text)


@decoding_options("preset", "max_new_tokens", "steps", "policy", "threshold", "temperature", "top_p", "seed")
def chat(model: Model, system: System = None, *, decoding: dict[str, Any]) -> None:
    """Chat with a model; on a terminal the masks are shown as they become tokens.

    /reset forgets the conversation, /quit ends it, Ctrl-C stops an answer.
    """
    from unmask.generation.chat import chat as run

    denoiser, tokenizer, _ = _load(model, decoding)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  gives the prompt its history and line editing

    ask = partial(input, "> " if interactive else "")
    run(denoiser, tokenizer, ask=ask, console=Console(), system=system, **decoding)


@decoding_options("preset", "steps", "policy", "threshold", "temperature", "top_p", "seed")
def infill(
    model: Model,
    text: Annotated[str | None, Option(help=f"With gaps: [\\[gap:5]], or [\\[gap:2-8]]; {STDIN}.")] = None,
    prefix: Annotated[str | None, Option(help="Text before the only gap.")] = None,
    suffix: Annotated[str | None, Option(help="Text after the only gap.")] = None,
    length: Annotated[
        str | None, Option(metavar="N or N-M", help="Tokens of that gap, or a range to try.")
    ] = None,
    prompt: Annotated[str | None, Option(help="What the user says, if the text is the answer.")] = None,
    end_fill: EndFill = None,
    batch_size: BatchSize = 16,
    *,
    decoding: dict[str, Any],
) -> None:
    """Fill the gaps of a text, given the text before and after them.

    Every length of a gap such as [\\[gap:2-8]] is tried, and the likeliest text
    wins. A backslash before it makes it plain text. Needs a bidirectional
    model.
    """
    if (text is None) == (prefix is None and suffix is None):
        raise UnmaskError("give --text with gaps in it, or --prefix and --suffix with --length.")
    if text is None and length is None:
        raise UnmaskError("--prefix and --suffix need --length, the tokens between them: 5, or 2-8.")
    refuse_unused(text is not None, "with --text; write [[gap:5]] into it", length=length)
    refuse_unused(prompt is None, "without --prompt", end_fill=end_fill)
    from unmask.generation.infill import infill_text, parse_gaps
    from unmask.generation.prompts import chat_encoder, prompt_example

    if text is not None:
        parts = parse_gaps(read_stdin() if text == "-" else text)
    else:
        pieces = (prefix, *parse_gaps(f"[[gap:{length}]]"), suffix)
        parts = [piece for piece in pieces if piece]
    denoiser, tokenizer, _ = _load(model, decoding)
    answer_to: dict[str, Any] = {}
    if prompt is not None:
        end = chat_encoder(tokenizer).end_token_id
        answer_to = {"prompt": prompt_example(tokenizer, prompt, to_answer=True), "end": end}
    sizes = {"end_fill": end_fill or 1, "batch_size": batch_size}
    done = infill_text(denoiser, tokenizer, parts, **answer_to, **sizes, **decoding)
    lengths, log_probability = done.tried[0]
    print(
        f"gaps of {', '.join(map(str, lengths))} tokens, log-probability {log_probability:.3f} nats,"
        f" {done.num_forwards} forward passes; lengths tried: {len(done.tried)}",
        file=sys.stderr,
    )
    print(done.text)


def insert_trace_value(arguments: Sequence[str]) -> list[str]:
    """Let --trace have no value, which Typer does not: a page or a picture may follow it."""
    inserted: list[str] = []
    for argument, following in pairwise([*arguments, ""]):
        inserted.append(argument)
        if argument == "--trace" and not following.lower().endswith(PICTURES):
            inserted.append(IN_TERMINAL)
    return inserted


def hide_progress_bars(checkpoint: str | None = None) -> None:
    """Hide the bars of transformers and the hub; on a terminal not those of downloads, nor those of reading and
    writing weights where `checkpoint` has many."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    terminal, downloads = sys.stderr.isatty(), not are_progress_bars_disabled()
    if not (terminal and checkpoint is not None and bytes_of_weights(checkpoint) >= LARGE):
        logging.disable_progress_bar()
        if terminal and downloads:
            enable_progress_bars()


def bytes_of_weights(checkpoint: str) -> int:
    """Size of the weights of a folder, or of a hub name in the cache; 0 where there are none yet."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(checkpoint, "config.json")
        except HFValidationError:  # neither a folder nor a name: the error of what opens it says so
            return 0
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _load(name: str, decoding: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model, on the accelerator if there is one; its tokenizer; its settings with those given, checked."""
    hide_progress_bars(name)
    from unmask.data.tokenizer import check_vocabulary, load_tokenizer
    from unmask.model.bf16 import place_for_inference
    from unmask.model.checkpoint import load_model

    model: Any = load_model(name)
    place_for_inference(model)
    config = copy.deepcopy(model.generation_config)
    config.set(**decoding)
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, model.config, name)
    return model, tokenizer, config


def read_stdin() -> str:
    """Standard input as text, without its last line end."""
    data = sys.stdin.buffer.read()  # in some locales the text layer passes on bytes that are not text
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnmaskError(f"standard input: not UTF-8 text (line {line}); save it as UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _show_trace(
    trace: str, answers: list[Any], tokenizer: Any, title: str, prompt: str, names: list[str]
) -> None:
    from unmask.generation.trace import trace_lines, write_trace_page
    from unmask.plots import draw_trace

    if trace.lower().endswith(".html"):
        write_trace_page(Path(trace), answers, tokenizer, title=title, prompt=prompt, names=names)
    elif trace != IN_TERMINAL:
        draw_trace(Path(trace), answers, title=title, names=names)
    else:
        for answer in answers:
            for line in trace_lines(answer.ids, answer.commit_step, tokenizer):
                Console(stderr=True).print(line)


def _answer_file(answer: Any, prompts: list[Any], out: Path, *, samples: int, **options: Any) -> None:
    """Answer a file with a progress bar, and print the totals."""
    from unmask.generation.answer_file import answer_file
    from unmask.processes import rank_and_size

    rank, processes = rank_and_size()
    try:
        with Bar("answering", len(prompts) * samples / processes, "prompts") as advance:
            totals = answer_file(answer, prompts, out, samples=samples, advance=advance, **options)
    except KeyboardInterrupt:
        print(f"interrupted; --resume continues {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    if rank:
        return
    line = f"{out}: {totals['answers']:,} answers to {len(prompts):,} prompts"
    if steps := totals["forward_passes"]:
        per_step = f"{steps:,} denoising steps ({totals['tokens'] / steps:.2f} per step)"
        line += f", {totals['tokens']:,} tokens in {per_step}"
    print(line)
