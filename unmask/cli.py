"""The `unmask` command: each subcommand parses, calls one public function, and prints."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer import Argument, Option

from unmask import __version__, cli_eval, cli_generate, cli_recipe, cli_serve
from unmask.cli_complete import complete_override, complete_recipe
from unmask.cli_generate import hide_progress_bars
from unmask.cli_options import Model
from unmask.errors import UnmaskError, UnmaskNote
from unmask.explain import help_page

app = typer.Typer(
    name="unmask",
    help="Turn Qwen3, Qwen2, Llama, Mistral and Gemma into masked-diffusion language models, or open released"
    " ones; train, sample, measure and serve them.",
    pretty_exceptions_enable=False,
)
# Where `unmask --help` lists a command.
TRAIN, CHECKPOINTS, GENERATE, MEASURE = "Train", "Checkpoints", "Generate text", "Measure"

OVERVIEW = """\
unmask turns Qwen3 and other decoders into masked-diffusion
language models, and opens released ones.

Watch one learn on a laptop (4 minutes on two CPU cores):
  unmask train train_tiny_sft

Fine-tune a released one on a file of your own:
  unmask train train_qwen3_1.7b_sft \\
    model.name_or_path=Salesforce/CoDA-v0-Instruct \\
    data.dataset_name=my.jsonl

Turn Qwen3 into one, on the same file:
  unmask train train_qwen3_0.6b_sft \\
    data.dataset_name=my.jsonl

Measure it: how likely does it find texts it never saw?
  unmask score outputs/tiny-sft/final \\
    recipes/tiny/heldout.jsonl --end-fill 16

Serve it, with a playground in the browser:
  unmask serve outputs/tiny-sft/final

unmask --help lists all commands, unmask recipe list the
recipes that come with it."""

RANK = os.environ.get("RANK", "0")
OF_PROCESS = "" if RANK == "0" else f" (process {RANK})"
RANK_SECONDS = 3.0  # that a process of several waits before it prints its error
# What torch says of a GPU (the first, whose class is OutOfMemoryError) and of a CPU.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")
# Beginnings of warnings, as regular expressions, and why nobody needs to read them.
SILENT: tuple[tuple[str, type[Warning]], ...] = (
    # peft asks transformers for a property that has another name since 5.24; both answer the same until v6.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning),
)

RecipeFile = Annotated[
    Path,
    Argument(
        metavar="RECIPE",
        help="YAML file, or a name of `unmask recipe list`.",
        autocompletion=complete_recipe,
    ),
]
OutFolder = Annotated[Path, Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")]
Overrides = Annotated[
    list[str] | None,
    Argument(
        metavar="KEY=VALUE",
        help="Recipe keys to override, such as max_steps=100.",
        autocompletion=complete_override,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"unmask {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    debug: Annotated[
        bool, Option("--debug", help="Show the traceback of an error; anywhere in the command.")
    ] = False,
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(OVERVIEW)


@app.command(rich_help_panel=CHECKPOINTS)
def convert(
    base: Annotated[str, Argument(metavar="BASE", help="Autoregressive checkpoint: folder or hub name.")],
    out: OutFolder,
) -> None:
    """Make a diffusion checkpoint of an autoregressive one.

    The weights stay as they are; attention becomes bidirectional, the output
    is shifted by one, and the tokenizer gets a mask token. Train the result
    before use.
    """
    hide_progress_bars(base)
    from unmask.model.checkpoint import convert as run

    model, tokenizer = run(base, out)
    print(
        f"{out}: {type(model).__name__}, {model.num_parameters():,} parameters,"
        f" mask token {tokenizer.mask_token} = id {tokenizer.mask_token_id},"
        f" embedding of {model.config.vocab_size:,} rows"
    )


@app.command(rich_help_panel=CHECKPOINTS)
def export(
    model: Model,
    out: OutFolder,
    format: Annotated[
        str, Option("--as", help="dream, sdar, fast-dllm-v2, llada, a2d, or hub (plain transformers).")
    ] = "hub",
    push: Annotated[str | None, Option(metavar="NAME", help="Also upload it to the hub as NAME.")] = None,
) -> None:
    """Write a checkpoint in the format of another system.

    hub is a folder that transformers loads with trust_remote_code=True, without
    unmask; the others are what inference engines read.
    """
    hide_progress_bars(model)
    from unmask.model.export import export as run

    for note in run(model, out, format, push=push):
        print(f"{out}: {note}")


@app.command(rich_help_panel=CHECKPOINTS)
def doctor(
    model: Model,
    json: Annotated[bool, Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a checkpoint: format, sizes, tokens, versions, and how it reads a text.

    The last is a check by forward passes: if the text is read better with
    another shift or attention than the config says, something is wrong. Exit
    code 1 if anything is.
    """
    hide_progress_bars(model)
    from unmask.evaluation.doctor import diagnose, has_faults, show

    findings = diagnose(model)
    show(findings, as_json=json)
    raise typer.Exit(int(has_faults(findings)))


@app.command(rich_help_panel=TRAIN)
def data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[int, Option(min=0, help="Sequences to print.")] = 3,
    curriculum: Annotated[
        Path | None, Option(metavar="FILE", help="Picture to write (.png, .pdf, .svg): what every step uses.")
    ] = None,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="Page to write: the report and up to 1000 rows in colour.")
    ] = None,
) -> None:
    """Show what training will see: sequences in colour, lengths, what was dropped and why.

    Also tokens per source, how full the batches are, and duplicates.
    With --html the same as a page for a browser, with --curriculum how masking
    and attention change over the run.
    """
    settings = _settings(recipe, overrides)
    from unmask.data.dataset import first_shares, load_data, run_tokenizer
    from unmask.data.inspect import show_examples, show_report, survey, write_page
    from unmask.io import check_output_file
    from unmask.plots import check_picture, draw_curriculum
    from unmask.training.build import check_base, check_block_sizes, make_curriculum, schedule_notes

    if curriculum is not None:
        check_picture(curriculum, "--curriculum")
    if html is not None:
        check_output_file(html, "--html")
    check_base(settings)
    tokenizer = run_tokenizer(settings)
    loaded = load_data(settings, tokenizer)
    check_block_sizes(settings, loaded.train)
    console = Console()
    show_examples(loaded, tokenizer, limit=show, console=console)
    found = survey(loaded)
    show_report(found, console=console)
    lines, beginning = [], ", the beginning of each source" if settings.data.streaming else ""
    if settings.data.streaming:
        lines.append("stream: the figures are of the beginning of each source")
    if settings.data.sources is not None:
        lines.append(first_shares(loaded))
    if loaded.held_out:
        lines.append(f"held out: {len(loaded.held_out):,} sequences")
    lines += loaded.left_out(trained=[])
    lines += schedule_notes(settings, len(loaded.rows), settings.model.block_length)
    if curriculum is not None:
        epoch = -(-len(loaded.rows) // loaded.step_rows)
        draw_curriculum(make_curriculum(settings), settings.max_steps, epoch, curriculum)
        lines.append(f"curriculum: {curriculum}")
    if html is not None:
        which = write_page(html, loaded, found, tokenizer, title=f"unmask data {recipe}{beginning}")
        lines.append(f"page: {html} ({which})")
    for line in lines:
        console.print(line, highlight=False, markup=False)


@app.command(rich_help_panel=TRAIN)
def prepare(
    recipe: RecipeFile,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write, or to resume.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, Option(min=1, help="Processes that encode; by default one a core.")
    ] = None,
) -> None:
    """Encode the recipe's training data once, in parallel: Arrow shards with a manifest.

    Train from it with data.dataset_name=OUT. The same command resumes an
    interrupted one.
    """
    settings = _settings(recipe, overrides)
    from unmask.data.dataset import prepare as run
    from unmask.training.build import check_base

    check_base(settings)
    try:
        manifest = run(settings, out, workers=workers)
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    report, counts = manifest.report, manifest.counts
    print(
        f"{out}: {counts['rows']:,} sequences of {report.records:,} records, {counts['tokens']:,} tokens,"
        f" {counts['supervised_tokens']:,} supervised, {counts['bytes']:,} bytes"
    )
    for line in report.left_out():
        print(line)


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Train nothing: show the memory that each device would need.")
    ] = False,
    devices: Annotated[
        int | None, Option(min=1, help="With --dry-run: this number of devices alone.")
    ] = None,
) -> None:
    """Train what the recipe describes; leaves a checkpoint in its checkpoint_save_dir.

    With --dry-run neither weights nor data are read, only the config of the
    model. On several devices start it with torchrun --nproc_per_node=N -m
    unmask train.
    """
    if devices is not None and not dry_run:
        raise UnmaskError("--devices has no effect without --dry-run; torchrun --nproc_per_node=N starts N.")
    settings = _settings(recipe, overrides)
    if dry_run:
        from unmask.training.memory import dry_run as show

        show(settings, devices)
        return
    from unmask.training.train import train as run

    try:
        run(settings)
    except KeyboardInterrupt:  # before the run handles signals
        raise typer.Exit(130) from None


@app.command(rich_help_panel=TRAIN)
def merge(
    adapter: Annotated[str, Argument(metavar="ADAPTER", help="Folder that a run with lora.r leaves.")],
    out: OutFolder,
) -> None:
    """Add an adapter to the weights it was trained on: a plain diffusion checkpoint."""
    hide_progress_bars(adapter)
    from unmask.model.checkpoint import merge as run

    model, _ = run(adapter, out)
    print(f"{out}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")


app.add_typer(cli_recipe.app, name="recipe", rich_help_panel=TRAIN)
app.command(rich_help_panel=GENERATE)(cli_generate.generate)
app.command(rich_help_panel=GENERATE)(cli_generate.chat)
app.command(rich_help_panel=GENERATE)(cli_generate.infill)
app.command("eval", rich_help_panel=MEASURE)(cli_eval.evaluate)
app.command(rich_help_panel=GENERATE)(cli_serve.serve)
app.command(rich_help_panel=MEASURE)(cli_eval.score)


def _settings(recipe: Path, overrides: list[str] | None) -> Any:
    """Read a recipe, before the imports that take seconds."""
    from unmask.config import load_recipe

    if "=" in str(recipe) and not recipe.exists():
        raise UnmaskError(f"the recipe comes first: unmask train RECIPE {recipe}")
    settings = load_recipe(recipe, overrides or [])
    hide_progress_bars(settings.model.name_or_path)
    return settings


def main() -> None:
    """Run the command; an error ends in one line on the standard error, the place that explains it, and code 2."""
    # Before torch is loaded: its threads wait asleep. By default they spin, and on a machine with other work each
    # of thousands of short loops then waits for a thread that does not run: 3 to 5 times slower, measured. On an
    # idle one sleeping costs a small model a quarter of its speed; OMP_WAIT_POLICY=ACTIVE takes it back.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    arguments = cli_generate.insert_trace_value([one for one in sys.argv[1:] if one != "--debug"])
    try:
        with warnings_in_lines():
            code = app(arguments, prog_name="unmask", standalone_mode=False)
    except typer.Abort:  # the input ended
        sys.exit(1)
    except typer.TyperException as error:
        if not error.format_message():  # a group alone has shown its help
            sys.exit(error.exit_code)
        context = getattr(error, "ctx", None)  # of the command that was called wrongly
        command = "unmask" if context is None else context.command_path
        message = " ".join(error.format_message().split())
        option = getattr(error, "option_name", None)  # an option that is not there
        if context is not None and option and any(one.name == "overrides" for one in context.command.params):
            key = option.lstrip("-").replace("-", "_")
            message = f"{message.rstrip('.')}; recipe keys have no dashes: {key}=VALUE."
        _fail(error, message, f"{command} --help", debug)
    except Exception as error:
        if (message := explained(error)) is None:
            raise
        _fail(error, message, help_page(message, error), debug)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def explained(error: Exception) -> str | None:
    """What to tell the user of an error, in a line; None of one that is our own mistake."""
    if isinstance(error, UnmaskError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'writing'}: no space left on the disk; make room and try again."
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename}: permission denied; `ls -l` shows who may use it."
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}."
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    ):
        place = "GPU" if type(error).__name__ == "OutOfMemoryError" else "machine"
        return f"the {place} is out of memory; use a smaller batch, shorter sequences or a smaller model."
    return None


def _fail(error: Exception, message: str, page: str | None, debug: bool) -> NoReturn:
    if debug:
        raise error
    if RANK != "0":
        time.sleep(RANK_SECONDS)  # most often process 0 says the same, and torchrun ends this one meanwhile
    print(f"error{OF_PROCESS}: {message}", file=sys.stderr, flush=True)
    if page is not None and RANK == "0":
        print(f"help: {page}", file=sys.stderr, flush=True)
    os._exit(2) if "RANK" in os.environ else sys.exit(2)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning once, in one line, except the silent ones; Python's own -W options come first."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            kind = "note" if issubclass(category, UnmaskNote) else "warning"
            print(f"{kind}{OF_PROCESS}: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("default")
            for message, category in SILENT:
                warnings.filterwarnings("ignore", message, category)
        warnings.showwarning = show
        yield
