"""What a run measures on the way: the held-out loss by source and noise level, and generated answers.

The held-out loss is the bound on -log p per token with noise that never changes and a low variance: of the n
maskable tokens of a sample (of each block, in a block-causal model) exactly k are masked, k uniform on 1..n
(Nie et al., LLaDA, arXiv:2502.09992, eq. 6; see `unmask.diffusion.likelihood.exact_masks`). It depends on the
seed and the sample ids alone: not on batches, packing, processes or training settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unmask.config import Recipe
from unmask.data.collate import collate
from unmask.data.dataset import custom_fields, examples_of
from unmask.data.files import read_records
from unmask.diffusion.corrupt import Noised, corrupt, example_seeds
from unmask.diffusion.likelihood import Masks, exact_masks
from unmask.diffusion.objective import Objective
from unmask.evaluation.exact_match import exact_share, is_exact
from unmask.generation.prompts import Prompt, make_prompts
from unmask.generation.text import Completion, complete
from unmask.generation.trace import trace_lines
from unmask.io import atomic_write
from unmask.progress import Bar
from unmask.training.parallel import Processes, SharedModel

T = TypeVar("T")
BINS = 10  # of the noise level
EPOCH = -1  # evaluation noise is that of an epoch that training never reaches
SAMPLES = "samples.jsonl"


def model_batch(
    rows: Sequence[Any], pad_token_id: int, recipe: Recipe, device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Collate rows: arguments of the model's methods, and the sample ids."""
    tensors = {name: t.to(device, non_blocking=True) for name, t in collate(rows, pad_token_id).items()}
    ids = tensors.pop("sample_ids")
    if recipe.training_mode == "pretrain":
        del tensors["src_mask"]
    return tensors, ids


@torch.no_grad()
def held_out_loss(
    shared: SharedModel,
    rows: Sequence[Any],
    sources: Sequence[str],
    recipe: Recipe,
    pad_token_id: int,
    micro_batch: int,
) -> dict[str, float]:
    """Compute the held-out loss over all rows: one sum over one count, whatever the batch size.

    Called on every process, each of which takes every `ranks`-th row.

    Args:
        rows: examples, or packed rows of them.
        sources: names of the sources, by their number in the examples; empty if there is one.

    Returns:
        `eval_loss`, nats per token; `eval_loss_stderr`, its standard error, mostly that of the choice of
        samples; `eval_loss_SOURCE` where there are several; `eval_by_t/0.05` and so on, mean nll of masked
        tokens by noise level.
    """
    group, sums = shared.group, HeldOutSums(sources or [""], shared.group.device)
    mine = range(group.rank, len(rows), group.ranks)
    with shared.evaluating() as model, Bar("held-out loss", len(mine), "sequences") as advance:
        objective = Objective(eps=model.config.noise_eps)
        for start in range(0, -(-len(rows) // group.ranks), micro_batch):
            batch = [rows[index] for index in mine[start : start + micro_batch]]
            if not batch and not shared.sharded:
                break
            # Under FSDP every process takes part in every forward pass.
            inputs, ids = model_batch(batch or [rows[0]], pad_token_id, recipe, group.device)
            prepared = model.prepare(**inputs, training_mode=recipe.training_mode)
            noised = corrupt(prepared, objective, example_seeds(recipe.seed, ids, EPOCH))
            masks = exact_masks(noised, ids, recipe.seed)
            with shared.autocast():
                nll = model.masked_nll(is_masked=masks.is_masked, **inputs)
            if batch:
                sums.add(
                    masks, nll, noised, [[example.source for example in examples_of(row)] for row in batch]
                )
            advance(len(batch))
    return sums.metrics(group)


class HeldOutSums:
    """Adds up batches of an evaluation, by source and by noise level.

    Shapes: B batch, L sequence, M masked tokens.
    """

    def __init__(self, sources: Sequence[str], device: torch.device):
        self.sources = sources
        # Of each source: sums over its samples of their bound b, their tokens n, b b, b n, n n, and 1.
        self.samples = torch.zeros(len(sources), 6, dtype=torch.float64, device=device)
        # Of each level: nll of the masked tokens, and their number.
        self.levels = torch.zeros(BINS, 2, dtype=torch.float64, device=device)

    def add(self, masks: Masks, nll: Float[Tensor, "M"], noised: Noised, sources: list[list[int]]) -> None:
        """Add a batch.

        Args:
            nll: -log p of each masked token, in row-major order, in nats.
            sources: number of the source of each example, row by row.
        """
        is_masked, document, nll = masks.is_masked, noised.layout.document, nll.double()
        size, k = masks.size[is_masked], masks.k[is_masked]
        bound = torch.zeros(is_masked.shape, dtype=torch.float64, device=nll.device)
        bound[is_masked] = nll * size / k
        # One column a document, as many as a row has columns.
        per_sample = torch.zeros_like(bound).scatter_add_(1, document, bound)
        tokens = torch.zeros_like(bound).scatter_add_(1, document, noised.maskable.double())
        row, column = tokens.nonzero(as_tuple=True)
        n, b = tokens[row, column], per_sample[row, column]
        table = pad_sequence([torch.tensor(numbers) for numbers in sources], batch_first=True).to(nll.device)
        source = table[row, column].clamp(max=len(self.sources) - 1)
        self.samples.index_add_(0, source, torch.stack([b, n, b * b, b * n, n * n, n / n], dim=1))
        # Shares in ((i, i + 1] / BINS), in integers.
        level = (k * BINS + size - 1) // size - 1
        self.levels.index_add_(0, level, torch.stack([nll, torch.ones_like(nll)], dim=1))

    def metrics(self, group: Processes) -> dict[str, float]:
        """Return the losses over all processes, and the standard error of a ratio of sums (0 of one sample)."""
        samples, levels = group.sum(self.samples).cpu(), group.sum(self.levels).cpu()
        b, n, bb, bn, nn, count = samples.sum(dim=0).tolist()
        loss = b / max(n, 1)
        squares = max(0.0, bb - 2 * loss * bn + loss * loss * nn)
        stderr = math.sqrt(squares * count / (count - 1)) / n if count > 1 else 0.0
        metrics = {"eval_loss": loss, "eval_loss_stderr": stderr}
        for name, (b, n, *_) in zip(self.sources, samples.tolist(), strict=True):
            if len(self.sources) > 1 and n:
                metrics[f"eval_loss_{name}"] = b / n
        for level, (nll, count) in enumerate(levels.tolist()):
            if count:
                metrics[f"eval_by_t/{(level + 0.5) / BINS:.2f}"] = nll / count
        return metrics


class Answers:
    """Answers held-out prompts: all of them before and after training, a few at each evaluation."""

    def __init__(self, recipe: Recipe, encoder: Any, tokenizer: Any, console: Console):
        self.settings, self.tokenizer, self.console = recipe.evaluation, tokenizer, console
        self.prompts: list[Prompt] = []
        if self.settings.prompts is not None:
            records = read_records(self.settings.prompts, limit=self.settings.limit)
            self.prompts = make_prompts(
                records, encoder, format=recipe.data.sft.format, custom_format=custom_fields(recipe)
            )
        self.few = spread(self.prompts, self.settings.show)

    def measure(self, shared: SharedModel, when: str) -> list[Completion]:
        """Answer all prompts, and print the share that is exact; [] where this process has nothing to do."""
        completions = self._answer(shared, self.prompts, f"answering {when}")
        if completions:
            share = exact_share(completions, self.prompts)
            self.console.print(f"exact match {when}: {share:.1%} of {len(self.prompts)} held-out prompts")
        return completions

    def sample(self, shared: SharedModel, step: int, file: Path) -> list[tuple[str, str]]:
        """Answer the few prompts, append them to `samples.jsonl`; (prompt, answer) of each."""
        completions = self._answer(shared, self.few, "answering")
        if not completions or not shared.group.main:
            return []
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        # Those of later steps, before a resume from an earlier checkpoint, are made again.
        lines = [line for line in text.splitlines() if json.loads(line)["step"] < step]
        pairs = list(zip(self.few, completions, strict=True))
        for prompt, done in pairs:
            line = {"step": step, "prompt": prompt.text, "completion": done.text, "expected": prompt.expected}
            lines.append(json.dumps(line, ensure_ascii=False))
        atomic_write(file, "".join(f"{line}\n" for line in lines))
        return [(prompt.text, done.text) for prompt, done in pairs]

    def show(self, completions: list[Completion]) -> None:
        """Print a few answers, spread over the file, with their tokens appearing out of masks."""
        pairs = list(zip(self.prompts, completions, strict=True))
        for prompt, completion in spread(pairs, self.settings.show):
            exact = is_exact(completion, prompt)
            mark = "[green]correct[/]" if exact else f"[red]expected {escape(repr(prompt.expected))}[/]"
            self.console.print(f"\n[bold]{escape(prompt.text.strip())}[/]  {mark}")
            for line in trace_lines(completion.ids, completion.commit_step, self.tokenizer):
                self.console.print(line)
        self.console.print()

    def _answer(self, shared: SharedModel, prompts: Sequence[Prompt], what: str) -> list[Completion]:
        if not prompts or not (shared.group.main or shared.sharded):
            return []
        bar = Bar(what, len(prompts), "prompts", console=self.console)
        with shared.evaluating() as model, bar as advance:
            return complete(
                model,
                self.tokenizer,
                [prompt.example for prompt in prompts],
                batch_size=self.settings.batch_size,
                advance=advance,
                max_new_tokens=self.settings.max_new_tokens,
                steps=self.settings.steps,
            )


def spread(items: Sequence[T], count: int) -> list[T]:
    """Choose a few items, spread over all."""
    few = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(few)]
