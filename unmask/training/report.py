"""What a run prints: what it is going to do, and answers with their tokens appearing out of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

from unmask.data.mixture import shares
from unmask.data.pack import Row, filled
from unmask.data.stream import CHUNK, count_sources
from unmask.evaluation.exact_match import Prompt, exact_share, is_exact
from unmask.generation.text import Completion, complete
from unmask.generation.trace import trace_lines
from unmask.model.checkpoint import is_diffusion, read_config
from unmask.recipe import Recipe
from unmask.training.dataset import RunData

T = TypeVar("T")


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    prompts: list[Prompt],
    console: Console,
    when: str,
) -> list[Completion]:
    """Answer the held-out prompts and print the share that is exact."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"answering {when}", total=len(prompts))
        advance = partial(progress.advance, task)
        completions = write(model, tokenizer, recipe, prompts, advance)
    share = exact_share(completions, prompts)
    console.print(f"exact match {when}: {share:.1%} of {len(prompts)} held-out prompts")
    return completions


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer prompts as the recipe's `evaluation` says; `advance` is told the number done."""
    settings = recipe.evaluation
    model.eval()
    return complete(
        model,
        tokenizer,
        [prompt.example for prompt in prompts],
        batch_size=settings.batch_size,
        advance=advance,
        max_new_tokens=settings.max_new_tokens,
        steps=settings.steps,
    )


def shown(items: Sequence[T], count: int) -> list[T]:
    """Choose the few that are shown, spread over all."""
    few = min(count, len(items))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(few)]


def show_answers(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    completions: list[Completion],
    count: int,
) -> None:
    """Print a few answers, spread over the file, with their tokens appearing out of masks."""
    for prompt, completion in shown(list(zip(prompts, completions, strict=True)), count):
        mark = (
            "[green]correct[/]" if is_exact(completion, prompt) else f"[red]expected {prompt.expected!r}[/]"
        )
        console.print(f"\n[bold]{escape(prompt.text.strip())}[/]  {mark}")
        for line in trace_lines(completion.ids, completion.commit_step, tokenizer):
            console.print(line)
    console.print()


def attention_of(config: Any) -> str:
    """Name a model's attention."""
    if config.attention == "block_causal":
        return f"block-causal (blocks of {config.block_length} tokens)"
    return "bidirectional"


def name_of(model: Any) -> str:
    """The class of a model, also of one inside peft's."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def what_learns(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """Say which part of the model learns; None where all of it does."""
    if recipe.lora.r is not None:
        how = f"{'DoRA' if recipe.lora.use_dora else 'LoRA'} of rank {recipe.lora.r}"
    elif recipe.model.freeze_embeddings:
        how = "all but the embeddings"
    else:
        return None
    learning = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    return f"{how}, {learning:,} parameters"


def say_what_runs(
    console: Console, recipe: Recipe, model: PreTrainedModel, data: RunData, args: TrainingArguments
) -> None:
    tokens, supervised = data.totals()
    origin = recipe.model.name_or_path or "random weights"
    console.print(
        f"{name_of(model)} from {origin}: {model.num_parameters():,} parameters,"
        f" logit shift {'on' if model.config.logit_shift else 'off'}, {attention_of(model.config)} attention,"
        f" {args.device}, {recipe.precision}"
    )
    if (learning := what_learns(model, recipe)) is not None:
        console.print(f"what learns: {learning}")
    name = recipe.model.name_or_path
    if recipe.model.freeze_embeddings and (name is None or not is_diffusion(read_config(name))):
        console.print("note: these weights have never seen the mask token, and its embedding is frozen too")
    what = "stream, the beginning of each source" if recipe.data.streaming else "data"
    console.print(
        f"{what}: {len(data.train):,} examples, {tokens:,} tokens, {supervised / tokens:.0%} supervised,"
        f" {len(data.held_out):,} held out"
    )
    if data.row_length is not None:
        share = filled(cast(list[Row], data.rows), data.row_length)
        console.print(
            f"packing: {len(data.rows):,} rows of at most {data.row_length:,} tokens, {share:.1%} of their"
            f" positions filled, {len(data.train) / len(data.rows):.3g} sequences a row"
        )
    if data.report is not None:
        formats = ", ".join(f"{name} ({count:,})" for name, count in data.report.formats.items())
        console.print(f"format: {formats or 'text'}; truncated {data.report.truncated:,}")
    for line in data.left_out():
        console.print(line, markup=False)
    epochs = f", {recipe.max_steps * recipe.global_batch_size / len(data.rows):.3g} epochs"
    if data.stream is not None:
        sources = len(data.stream.mixture.sources)
        epochs = f", {sources} sources by weight" if sources > 1 else ""
    rows = "sequences" if data.row_length is None else "rows"
    console.print(
        f"{recipe.max_steps:,} steps of {recipe.global_batch_size} {rows}"
        f" ({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x"
        f" {args.world_size}){epochs}"
    )


def first_shares(data: RunData) -> str:
    """Say which share each source of a mixture has of the first chunk of the run."""
    assert data.stream is not None
    sources = data.stream.mixture.sources
    counts = count_sources(islice((row for row, _, _ in data.stream.rows()), CHUNK), len(sources))
    many = sum(examples for examples, _ in counts)
    return f"the run's first {many:,} sequences: {shares(counts, [source.label for source in sources])}"


def stream_lines(
    counts: list[list[int]], left_out: list[str], data: RunData, state: TrainerState, ended: bool
) -> list[str]:
    """Say what a run took from its stream, a line each: the shares of sources, and what was left out."""
    if data.stream is None:
        return []
    lines = []
    if ended:
        lines.append(
            f"the data ended after step {state.global_step} of {state.max_steps}:"
            " every source has had its epochs"
        )
    examples, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    lines.append(f"taken from the stream: {examples:,} examples, {tokens:,} tokens")
    if len(counts) > 1:
        lines.append(f"shares: {shares(counts, [source.label for source in data.stream.mixture.sources])}")
    return lines + left_out


def best_lines(state: TrainerState, patience: int | None) -> list[str]:
    """Say what early stopping did."""
    best = state.best_global_step
    if patience is None or best is None or state.best_metric is None:
        return []
    evaluations = [log["step"] for log in state.log_history if "eval_loss" in log and log["step"] > best]
    lines = []
    if len(set(evaluations)) >= patience and state.global_step < state.max_steps:
        many = "1 evaluation" if patience == 1 else f"{patience} evaluations in a row"
        lines.append(
            f"stopped early after step {state.global_step} of {state.max_steps}: {many} without a lower"
            " held-out loss"
        )
    loss = f"{state.best_metric:.4f} nats per token"
    return [*lines, f"the result has the weights of step {best}, of the lowest held-out loss: {loss}"]
