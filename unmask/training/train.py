"""One recipe -> one trained checkpoint: build, loop, evaluate, save, from top to bottom.

What is special here, next to any other training loop:
  - noise is data: each micro-batch is corrupted once, before the model sees it, as a function of (seed,
    sample, epoch), with low discrepancy also of the sample's place in the optimizer step;
  - the loss has one divisor, that of the whole optimizer step over all micro-batches and processes: by default
    the number of supervised tokens, so that it is in nats per supervised token;
  - batches and the learning rate are functions of the step: a resumed run needs no position of either.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from unmask.config import Recipe
from unmask.data.collate import collate
from unmask.data.dataset import Unit, load_data, run_tokenizer, source_names
from unmask.data.prepare import tokenizer_fingerprint
from unmask.diffusion.corrupt import Noised, corrupt, document_strata, example_seeds, low_discrepancy
from unmask.diffusion.loss import loss_divisor
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.evaluation.exact_match import exact_share
from unmask.io import atomic_dir, atomic_write, directory_lock
from unmask.model.bf16 import gains_by_bf16
from unmask.model.checkpoint import save_checkpoint
from unmask.training import checkpoint as checkpoints
from unmask.training.build import (
    build_model,
    check_base,
    check_block_sizes,
    loss_unit,
    make_curriculum,
    schedule_notes,
)
from unmask.training.card import FILE as PROVENANCE
from unmask.training.card import provenance, write_card
from unmask.training.checkpoint import FINAL, PREFIX, RECIPE
from unmask.training.evaluate import (
    SAMPLES,
    Answers,
    examples_of,
    held_out_loss,
    load_prompts,
    to_device,
)
from unmask.training.memory import memory_lines
from unmask.training.metrics import Accounting
from unmask.training.optim import WeightAverage, learning_rate, make_optimizer
from unmask.training.parallel import Processes, SharedModel, batch_plan, check_sharding, processes
from unmask.training.precision import with_precision
from unmask.training.report import SHARE, Report, describe_run
from unmask.training.resume import ResumePoint, check_fits, resume_point
from unmask.training.signals import StopSignals, leave

NON_FINITE = "non_finite.jsonl"  # in the run's folder: the steps whose loss or gradient was not finite
IN_A_ROW = 10  # steps left out one after another that end a run: its weights are beyond help


@dataclass
class TrainResult:
    """What a run came to: losses in nats per supervised token, exact match (before, after) as shares."""

    checkpoint: Path
    train_loss: float
    held_out_loss: float | None
    exact_match: tuple[float, float] | None


class MicroBatch(NamedTuple):
    """What one forward pass of a training step is made of."""

    inputs: Any
    noised: Noised
    units: list[Unit]


def train(recipe: Recipe, console: Console | None = None) -> TrainResult:
    """Run a recipe: encode the data, train, evaluate, and leave a checkpoint.

    Everything that can be wrong with the input is found before the first step. The folder
    `checkpoint_save_dir` then has `final/` (the model, its tokenizer, a model card), `loss.png`,
    `recipe.yaml`, and the intermediate checkpoints.

    Args:
        recipe: see `unmask.load_recipe`.
        console: where progress is shown; the terminal by default.

    Raises:
        UnmaskError: the recipe, the data or the model cannot be used, or a checkpoint cannot be written.
    """
    with StopSignals() as signals, processes() as group:
        console = console or Console(highlight=False, soft_wrap=True)
        if not group.main:
            return Run(recipe, Console(quiet=True), group, signals).train()
        with directory_lock(Path(recipe.checkpoint_save_dir), "training"):
            return Run(recipe, console, group, signals).train()


class Run:
    """A run of a recipe on this process; `train` is all of it."""

    def __init__(self, recipe: Recipe, console: Console, group: Processes, signals: StopSignals):
        self.console, self.group, self.signals = console, group, signals
        self.out = Path(recipe.checkpoint_save_dir)
        self.recipe = recipe

    def train(self) -> TrainResult:
        """Build, measure, train, measure again, and leave the result."""
        self._build()
        try:
            before = None if self.state.step else self.answers.measure("before training")
            if self.state.step == 0 and self.data.held_out and self.recipe.eval_steps:
                self._evaluate()
            self._loop()
            return self._finish(before)
        finally:
            self.report.close()

    # Build

    def _build(self) -> None:
        """Read everything, check everything, and put it together."""
        recipe, group = self.recipe, self.group
        check_sharding(recipe, group.ranks)
        self.micro_batch, self.accumulation = batch_plan(recipe, group.ranks)
        point: ResumePoint = group.on_main(lambda: resume_point(recipe, self.out))
        recipe, notes = group.on_main(lambda: with_precision(self.recipe, group.device, point.recipe))
        self.recipe = recipe
        for note in (*point.notes, *notes):
            self._say(note)

        check_base(recipe)
        self.tokenizer = run_tokenizer(recipe)
        self.data = load_data(recipe, self.tokenizer)
        check_block_sizes(recipe, self.data.train)
        self.answers_of = load_prompts(recipe, self.data.encoder)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, self.tokenizer, self.data.encoder)
        if (
            self.answers_of
        ):  # the canvas a model is measured on is the one it is used with, unless told otherwise
            self.model.generation_config.set(max_new_tokens=recipe.evaluation.max_new_tokens)
        denoiser = self.model.get_base_model() if recipe.lora.r is not None else self.model
        for line in describe_run(recipe, self.model, self.data, group):
            self._say(line)
        row_length = self.data.row_length or recipe.data.block_size
        for line in memory_lines(recipe, denoiser, group.device, group.ranks, row_length):
            self._say(line)
        for line in schedule_notes(recipe, len(self.data.rows), denoiser.config.block_length):
            self._say(line)

        self.report = Report(self.console, recipe, loss_unit(recipe), self.out, group)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else next(denoiser.parameters()).dtype
        if dtype == torch.bfloat16 and not gains_by_bf16(group.device):
            dtype = torch.float32  # what such a CPU can do
        self.accounting = Accounting(denoiser, dtype, group)
        self.shared = SharedModel(denoiser, recipe, group)
        self.optimizer = make_optimizer(recipe, denoiser, self.shared.parameters)
        decay = recipe.ema.decay
        self.average = None if decay is None else WeightAverage(self.shared.parameters, decay)
        self.curriculum = make_curriculum(recipe)
        self.source_names = source_names(recipe)
        self.steps = self.data.steps(group.rank, group.ranks, recipe.data.num_workers)
        self.answers = Answers(self.answers_of, self.shared, self.tokenizer, recipe, self.console)
        self.origin = provenance(recipe, self.tokenizer, group) if group.main else {}

        self.state = point.state
        # By the sessions before this one; a stream has them in its position.
        self.counted_before = [] if recipe.data.streaming else point.state.source_counts
        self.state.precision = recipe.precision
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        if point.checkpoint is not None:
            check_fits(point, denoiser.config, fingerprint)
            self._load(point.checkpoint)
        self.state.tokenizer = fingerprint
        if group.main:
            checkpoints.remove_partial(self.out)
            atomic_write(self.out / RECIPE, recipe.to_yaml())
        group.wait()

    def _load(self, folder: Path) -> None:
        """Load the tensors of a checkpoint, and the position of a stream."""
        average = None if self.average is None else self.average.average
        checkpoints.load_tensors(folder, self.shared.parameters, self.optimizer, average, self.group)
        if self.state.data and any(self.state.data):
            if len(self.state.data) != self.group.ranks:
                raise UnmaskError(
                    f"resume_from_checkpoint: {folder}: a stream resumes on as many processes as it was read"
                    f" by, {len(self.state.data)}; there are {self.group.ranks}."
                )
            self.steps.load_state_dict(self.state.data[self.group.rank])

    # Loop

    def _loop(self) -> None:
        """Take the optimizer steps, with what comes between them."""
        recipe, state = self.recipe, self.state
        self.shared.module.train()
        self.accounting.start()
        self.report.begin(state.step)
        self.signals.at_once = False
        self.stop, self.data_ended = 0, False
        if state.evaluation_due:
            self._evaluate()
        while state.step < recipe.max_steps and not self._stopped_early():
            if not self._step():
                break
            state.step += 1
            self.report.advance(state.step)
            if state.step % recipe.log_steps == 0 or state.step in (1, recipe.max_steps):
                self._log()
            due = bool(recipe.eval_steps) and state.step % cast(int, recipe.eval_steps) == 0
            state.evaluation_due = due and bool(self.stop)  # what takes long is left to the resumed run
            if due and not self.stop:
                self._evaluate()
                self.stop = self._agree(torch.zeros(2, dtype=torch.float64))[1]
            if self.stop or (recipe.save_steps and state.step % recipe.save_steps == 0):
                self._save()
            if self.stop:
                self.report.close()
                self._say(f"stopped after step {state.step}; resume with resume_from_checkpoint=auto")
                leave(self.stop)
        self.report.progress.stop()

    def _step(self) -> bool:
        """Take one optimizer step; False if the data have ended."""
        recipe, group, step = self.recipe, self.group, self.state.step
        # 1. The batch of this process, a function of the step; what dropout draws is one, too.
        units = self.steps.at(step)
        ended = torch.tensor([float(units is None)], device=group.device)
        if (recipe.data.streaming and group.sum(ended).item()) or units is None:
            self.data_ended = True
            return False
        torch.manual_seed((recipe.seed * 1_000_003 + step) * 4_096 + group.rank)
        objective = self.curriculum.at(step, self._epoch(step))
        # 2. Noise is data: drawn once, before the model.
        size = self.micro_batch
        batches = [
            self._corrupted(units[start : start + size], objective) for start in range(0, len(units), size)
        ]
        # 3. One divisor for the whole step.
        divisor = torch.stack([loss_divisor(batch.noised, objective) for batch in batches]).sum()
        divisor = group.sum(divisor.to(torch.float64)).clamp(min=1)
        self.accounting.mark("data")
        # 4. Forward and backward. Gradients are averaged over processes, and the divisor counts all of them.
        losses = []
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with nullcontext() if last else self.shared.accumulating():
                loss = self.shared.loss(batch.inputs, batch.noised, objective, divisor)
                self.accounting.mark("forward")
                (loss * group.ranks).backward()
            losses.append(loss.detach())
            self.accounting.mark("backward")
        norm = self._clip()
        # 5. All processes agree: is it finite, and has any of them been asked to stop?
        local = torch.stack(losses)
        total = torch.stack([local.double().sum(), (~local.isfinite()).any().double()])
        (loss_value, bad), self.stop = self._agree(total)
        if bad or not math.isfinite(norm):
            self._non_finite(batches, local, norm)
        else:
            # 6. The optimizer, at the rate of this step.
            for settings in self.optimizer.param_groups:
                settings["lr"] = learning_rate(recipe, step)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.state.skipped_in_a_row = 0
            self.state.loss_sum += loss_value
            self.state.loss_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.norm, self.objective = norm, objective
        self.accounting.mark("optimizer")
        return True

    def _corrupted(self, units: list[Unit], objective: Objective) -> MicroBatch:
        """Collate some units and draw their noise."""
        recipe, device = self.recipe, self.group.device
        rows = [unit.row for unit in units]
        tensors = to_device(collate(rows, pad_token_id=cast(int, self.tokenizer.pad_token_id)), device)
        ids = tensors["sample_ids"]
        epochs = torch.tensor([unit.epoch for unit in units], device=device)
        seeds = example_seeds(recipe.seed, ids, epochs if ids.dim() == 1 else epochs[:, None])
        strata = None
        if recipe.model.time_sampling == "low_discrepancy":
            place = torch.tensor([unit.place for unit in units], device=device)
            strata = low_discrepancy(recipe.seed, self.state.step, place, total=recipe.global_batch_size)
            if ids.dim() == 2:
                strata = document_strata(strata, ids.shape[1])
        sft = recipe.training_mode == "sft"
        inputs = self.shared.model.prepare(
            tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            src_mask=tensors["src_mask"] if sft else None,
            training_mode=recipe.training_mode,
            segment_ids=tensors.get("segment_ids"),
        )
        noised = corrupt(inputs, objective, seeds, strata)
        packed = "segment_ids" in tensors and noised.block is None and objective.future_share == 1
        self.accounting.count(noised, objective.complementary, packed and not recipe.torch_compile)
        return MicroBatch(inputs, noised, units)

    def _clip(self) -> float:
        """Clip the gradient to its largest norm; its norm before."""
        parameters = self.shared.parameters.values()
        most = self.recipe.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _agree(self, values: Tensor) -> tuple[list[float], int]:
        """Add up some values over the processes, and find out whether one of them received a signal."""
        signal = torch.zeros(32, dtype=torch.float64)
        signal[self.signals.received] = 1
        both = torch.cat([values.to(self.group.device), signal.to(self.group.device)])
        both = self.group.sum(both).tolist()
        received = [number for number, count in enumerate(both[len(values) :]) if number and count]
        return both[: len(values)], max(received, default=0)

    def _epoch(self, step: int) -> int:
        """Epoch of a step, for settings with one value an epoch; 0 where sources have epochs of their own."""
        if self.recipe.data.streaming or self.recipe.data.sources is not None:
            return 0
        return step * self.recipe.global_batch_size // len(self.data.rows)

    def _non_finite(self, batches: list[MicroBatch], losses: Tensor, norm: float) -> None:
        """Write the step down, and stop or leave it out: no weight and no state of the optimizer changes."""
        state, file = self.state, self.out / NON_FINITE
        mine = [
            {
                "process": self.group.rank,
                "loss": str(float(loss)),
                "records": [
                    f"source {one.source} sample {one.sample_id}"
                    for unit in batch.units
                    for one in examples_of(unit.row)
                ],
            }
            for batch, loss in zip(batches, losses, strict=True)
        ]
        found = [batch for part in self.group.gather(mine) for batch in part]
        bad = [batch for batch in found if not math.isfinite(float(batch["loss"]))]
        entry = {"step": state.step + 1, "grad_norm": str(norm), "micro_batches": bad or found}
        if self.group.main:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(entry) + "\n")
        names = [name for batch in bad or found for name in batch["records"]]
        what = f"the loss is {bad[0]['loss']}" if bad else f"the gradient's norm is {norm}"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        said = f"step {state.step + 1}: {what}, of {', '.join(names[:8])}{more} (see {file})"
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self.recipe.on_non_finite == "skip" and state.skipped_in_a_row < IN_A_ROW:
            self._say(f"{said}; the step is left out")
            return
        newest, _ = checkpoints.newest_whole(self.out, contents=False)
        place = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
        if self.recipe.on_non_finite == "skip":
            raise UnmaskError(
                f"{said}; {IN_A_ROW} steps in a row were left out, and further ones would be. {place}: resume"
                " from an earlier one with a lower optimizer.learning_rate."
            )
        raise UnmaskError(
            f"{said}; no weight was changed by it, and {place}. Lower optimizer.learning_rate, take the"
            " samples out, or leave such steps out with on_non_finite=skip."
        )

    # Between steps

    def _log(self) -> None:
        """Log the mean loss since the last log."""
        state = self.state
        steps = max(1, state.loss_steps)
        logs = {
            "step": state.step,
            "loss": state.loss_sum / steps if state.loss_steps else math.nan,
            "grad_norm": self.norm,
            "learning_rate": learning_rate(self.recipe, state.step - 1),
        }
        if state.skipped:
            logs["skipped_steps"] = state.skipped
        counts = self._source_counts()
        if len(counts) > 1:
            total = max(1, sum(tokens for _, tokens in counts))
            for name, (_, tokens) in zip(self.source_names, counts, strict=True):
                logs[SHARE + name] = tokens / total
        logs.update({f"curriculum/{k}": v for k, v in self.curriculum.state(self.objective).items()})
        logs.update(self.accounting.report().logs())
        state.loss_sum, state.loss_steps = 0.0, 0
        state.history.append(logs)
        self.report.log(logs)

    def _source_counts(self) -> list[list[int]]:
        """Examples and tokens of each source so far, over all processes."""
        counts = self.steps.counts()
        if not counts:
            return []
        total = self.group.sum(torch.tensor(counts, device=self.group.device))
        return (total + torch.tensor(self.counted_before or 0, device=total.device)).tolist()

    def _evaluate(self) -> None:
        """Compute the held-out loss and a few samples, with the averaged weights where there are some."""
        self.accounting.mark("other")
        state = self.state
        if self.average is None:
            self._measure()
        else:
            with self.average.in_place():
                self._measure()
        state.evaluation_due = False
        loss = state.history[-1]["eval_loss"]
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.without_improvement = loss, state.step, 0
        else:
            state.without_improvement += 1
        self.shared.module.train()
        self.accounting.mark("evaluation")

    def _measure(self) -> None:
        metrics = held_out_loss(
            self.shared,
            self.data.held_out_rows,
            self.data.held_out_sources,
            self.recipe,
            cast(int, self.tokenizer.pad_token_id),
            self.micro_batch,
            self.group,
        )
        logs = {"step": self.state.step, **metrics}
        self.state.history.append(logs)
        self.report.log(logs)
        self.report.draw(self.state.history)
        texts = self.answers.sample(self.state.step, self.out / SAMPLES)
        self.report.samples(texts, self.state.step)

    def _stopped_early(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state.without_improvement >= patience

    def _save(self) -> None:
        """Write a checkpoint of this step, and remove old ones."""
        self.accounting.mark("other")
        self.state.data = self.group.gather(self.steps.state_dict())
        self.state.source_counts = self._source_counts()
        sharded, lora = self.shared.sharded, self.recipe.lora.r is not None
        average = None if self.average is None else self.average.average
        tensors = checkpoints.training_tensors(
            self.shared.parameters, self.optimizer, average, with_weights=sharded or lora
        )

        def write_rest(folder: Path) -> None:
            if sharded:
                self.shared.model.config.save_pretrained(folder)
            else:
                save_checkpoint(self.model, self.tokenizer, folder)
            (folder / RECIPE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            (folder / PROVENANCE).write_text(json.dumps(self.origin, indent=2), encoding="utf-8")

        folder = self.out / f"{PREFIX}{self.state.step}"
        checkpoints.save(folder, self.state, tensors, self.group, write_rest)
        if self.group.main:
            checkpoints.rotate(self.out, self.recipe.save_total_limit, self.state.best_step)
        self.accounting.mark("save")

    # Finish

    def _finish(self, before: Any) -> TrainResult:
        """Evaluate what was trained, and leave it with its model card."""
        recipe, state, group = self.recipe, self.state, self.group
        # The rest is short work on what is trained; without a checkpoint of it, it would be lost.
        self.signals.at_once = recipe.save_steps is not None
        for line in self._end_lines():
            self._say(line)
        if recipe.early_stopping_patience is not None and state.best_step not in (None, state.step):
            best = self.out / f"{PREFIX}{state.best_step}"
            average = None if self.average is None else self.average.average
            checkpoints.load_tensors(best, self.shared.parameters, self.optimizer, average, group)
        if self.average is not None:
            self.average.put()  # from here on the weights are the average
            self.average = None
        held_out = None
        if self.data.held_out:
            step = state.best_step if recipe.early_stopping_patience else state.step
            known = [log["eval_loss"] for log in state.history if "eval_loss" in log and log["step"] == step]
            if not known:
                self._evaluate()
            held_out = known[-1] if known else state.history[-1]["eval_loss"]
        self.report.draw(state.history)
        self.accounting.report()
        for line in self.accounting.session.lines():
            self._say(line)
        after = self.answers.measure("after training")
        shares = None
        if before is not None and after is not None:
            shares = exact_share(before, self.answers_of), exact_share(after, self.answers_of)
        losses = [(log["step"], log["loss"]) for log in state.history if "loss" in log]
        train_loss = _mean_loss(losses)
        self._leave(train_loss, held_out, shares)
        if group.main:
            if after is not None:
                self.answers.show(after)
            self._say(f"checkpoint: {self.out / FINAL}   loss curve: {self.out / 'loss.png'}")
            if shares is not None:
                self._say(
                    f"exact match: before {shares[0]:.1%}, after {shares[1]:.1%} on {len(self.answers_of)}"
                    " held-out prompts"
                )
        group.wait()
        return TrainResult(self.out / FINAL, train_loss, held_out, shares)

    def _leave(self, train_loss: float, held_out: float | None, shares: tuple[float, float] | None) -> None:
        """Write `final/`; under FSDP every process gives its part of each weight, one weight at a time."""
        weights: dict[str, Tensor] | None = None
        if self.shared.sharded:
            weights = {}
            for name, parameter in self.model.named_parameters():
                whole = parameter.detach()
                whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
                if self.group.main:
                    weights[name] = whole.cpu()
        if not self.group.main:
            return
        with atomic_dir(self.out / FINAL) as aside:
            save_checkpoint(self.model, self.tokenizer, aside, weights)
            write_card(
                aside,
                self.out / FINAL,
                recipe=self.recipe,
                model=self.model,
                state=self.state,
                data=self.data,
                usage=self.accounting.session,
                origin=self.origin,
                train_loss=train_loss,
                held_out_loss=held_out,
                exact_match=shares,
            )

    def _end_lines(self) -> list[str]:
        """Say what ended the run, and what a mixture or a stream came to."""
        state, recipe, lines = self.state, self.recipe, []
        if self.data_ended:
            lines.append(
                f"the data ended after step {state.step} of {recipe.max_steps}: every source has had its epochs"
            )
        counts = self._source_counts()
        if len(counts) > 1:
            total = max(1, sum(tokens for _, tokens in counts))
            shares = (
                f"{name} {tokens / total:.1%}"
                for name, (_, tokens) in zip(self.source_names, counts, strict=True)
            )
            lines.append(f"tokens of each source: {', '.join(shares)}")
        if recipe.early_stopping_patience is not None and state.best_loss is not None:
            if self._stopped_early() and state.step < recipe.max_steps:
                lines.append(
                    f"stopped early after step {state.step} of {recipe.max_steps}:"
                    f" {state.without_improvement} evaluations without a lower held-out loss"
                )
            lines.append(
                f"the result has the weights of step {state.best_step}, of the lowest held-out loss:"
                f" {state.best_loss:.4f} nats per token"
            )
        return lines

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)


def _mean_loss(losses: list[tuple[float, float]]) -> float:
    """The mean over the steps; each entry is the mean since the one before."""
    total, last = 0.0, 0.0
    for step, loss in losses:
        total += loss * (step - last)
        last = step
    return total / last if last else math.nan
