"""What a run prints: what it is going to do, and answers with their tokens appearing out of masks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from unmask.evaluation.exact_match import Prompt, exact_share, is_exact
from unmask.generation.complete import Completion, complete
from unmask.generation.trace import trace_lines
from unmask.recipe import Recipe
from unmask.training.dataset import RunData


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    prompts: list[Prompt],
    console: Console,
    when: str,
) -> list[Completion]:
    """Answer the held-out prompts and print the share that is exact."""
    settings = recipe.evaluation
    model.eval()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"answering {when}", total=len(prompts))
        completions = complete(
            model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            batch_size=settings.batch_size,
            advance=lambda count: progress.advance(task, count),
            max_new_tokens=settings.max_new_tokens,
            steps=settings.steps,
        )
    share = exact_share(completions, prompts)
    console.print(f"exact match {when}: {share:.1%} of {len(prompts)} held-out prompts")
    return completions


def show_answers(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    completions: list[Completion],
    count: int,
) -> None:
    """Print a few answers, spread over the file, with their tokens appearing out of masks."""
    for place in range(min(count, len(prompts))):
        index = (2 * place + 1) * len(prompts) // (2 * count)
        prompt, completion = prompts[index], completions[index]
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


def say_what_runs(
    console: Console, recipe: Recipe, model: PreTrainedModel, data: RunData, args: TrainingArguments
) -> None:
    tokens = sum(len(example.input_ids) for example in data.train)
    supervised = sum(example.supervised for example in data.train)
    origin = recipe.model.name_or_path or "random weights"
    console.print(
        f"{type(model).__name__} from {origin}: {model.num_parameters():,} parameters,"
        f" logit shift {'on' if model.config.logit_shift else 'off'}, {attention_of(model.config)} attention,"
        f" {args.device}, {recipe.precision}"
    )
    console.print(
        f"data: {len(data.train):,} examples, {tokens:,} tokens, {supervised / tokens:.0%} supervised,"
        f" {len(data.held_out):,} held out"
    )
    if data.report is not None:
        formats = ", ".join(f"{name} ({count:,})" for name, count in data.report.formats.items())
        console.print(f"format: {formats}; truncated {data.report.truncated:,}")
        for reason, (count, where) in data.report.dropped.items():
            console.print(f"dropped {count:,}: {reason} (first: {where})")
    epochs = recipe.max_steps * recipe.global_batch_size / len(data.train)
    console.print(
        f"{recipe.max_steps:,} steps of {recipe.global_batch_size} sequences"
        f" ({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x"
        f" {args.world_size}), {epochs:.3g} epochs"
    )
