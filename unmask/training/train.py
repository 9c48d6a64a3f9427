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
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from unmask.config import Recipe
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
from unmask.training.build import build_model, check_base, check_block_sizes, make_curriculum, schedule_notes
from unmask.training.card import provenance, write_card
from unmask.training.checkpoint import (
    FINAL,
    PREFIX,
    RECIPE,
    Checkpointer,
    ResumePoint,
    checkpoints,
    remove_partial,
    resume_point,
)
from unmask.training.evaluate import SAMPLES, Answers, examples_of, held_out_loss, model_batch
from unmask.training.memory import memory_lines
from unmask.training.metrics import Accounting
from unmask.training.optim import WeightAverage, learning_rate, make_optimizers
from unmask.training.parallel import Processes, SharedModel, batch_plan, processes
from unmask.training.precision import with_precision
from unmask.training.report import SHARE, Report, run_facts
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
    out = Path(recipe.checkpoint_save_dir)
    with StopSignals() as signals, processes() as group:
        if not group.main:
            return Run(recipe, Console(quiet=True), group, signals).train()
        try:
            with directory_lock(out, "training"):
                # In a notebook too the lines are text: of a console of Jupyter each is an output of its own.
                console = console or Console(highlight=False, soft_wrap=True, force_jupyter=False)
                return Run(recipe, console, group, signals).train()
        finally:
            with suppress(OSError):
                out.rmdir()  # where it is empty: the run was refused


class Run:
    """A run of a recipe on this process; `train` is all of it."""

    def __init__(self, recipe: Recipe, console: Console, group: Processes, signals: StopSignals):
        self.console, self.group, self.signals = console, group, signals
        self.out, self.recipe = Path(recipe.checkpoint_save_dir), recipe
        self.report = Report(console, recipe, self.out, group)
        self.say = self.report.say
        self.stop, self.data_ended = 0, False

    def train(self) -> TrainResult:
        """Build, measure, train, measure again, and leave the result."""
        try:
            point = self._build()
            if point.checkpoint is not None:
                self._resume(point.checkpoint)
            if self.state.step == 0:
                before = self.answers.measure(self.shared, "before training")
                self.state.exact_before = exact_share(before, self.answers.prompts) if before else None
            if self.state.step == 0 and self.data.held_out and self.recipe.eval_steps:
                self._evaluate()
            self._loop()
            return self._finish()
        finally:
            self.report.close()

    def _build(self) -> ResumePoint:
        """Read everything, check everything, and put it together."""
        group = self.group
        self.micro_batch, _ = batch_plan(self.recipe, group.ranks)
        point: ResumePoint = group.on_main(lambda: resume_point(self.recipe, self.out))
        self.recipe, notes = group.on_main(lambda: with_precision(self.recipe, group.device, point.recipe))
        recipe, self.state = self.recipe, point.state
        for note in (*point.notes, *notes):
            self.say(note)

        check_base(recipe)
        self.tokenizer = run_tokenizer(recipe)
        self.data = load_data(recipe, self.tokenizer)
        check_block_sizes(recipe, self.data.train)
        self.source_names, self.steps = source_names(recipe), self.data.steps(group.rank, group.ranks)
        self.answers = Answers(recipe, self.data.encoder, self.tokenizer, self.console)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, self.tokenizer, self.data.encoder)
        if self.answers.prompts:  # the model is measured as it is used by default
            self.model.generation_config.set(max_new_tokens=recipe.evaluation.max_new_tokens)
        denoiser = self.model if recipe.lora.r is None else self.model.get_base_model()
        row_length = self.data.row_length or recipe.data.block_size
        self.facts = run_facts(recipe, self.model, self.data, group)
        for line in (
            *(f"{name}: {fact}" for name, fact in self.facts.items()),
            *memory_lines(recipe, denoiser, group.device, group.ranks, row_length),
            *schedule_notes(recipe, len(self.data.rows), denoiser.config.block_length),
        ):
            self.say(line)
        self.report.open()

        dtype = torch.bfloat16 if recipe.precision == "bf16" else next(denoiser.parameters()).dtype
        dtype = dtype if gains_by_bf16(group.device) else torch.float32  # what such a CPU can do
        self.accounting = Accounting(denoiser, dtype, group)
        self.shared = SharedModel(denoiser, recipe, group)
        self.optimizers = make_optimizers(recipe, denoiser, self.shared.parameters)
        self.average = WeightAverage(self.shared.parameters, recipe.ema.decay) if recipe.ema.decay else None
        self.curriculum = make_curriculum(recipe)
        self.origin = provenance(recipe, self.tokenizer, group) if group.main else {}
        self.checkpointer = Checkpointer(
            recipe, self.model, self.tokenizer, self.shared, self.optimizers, self.average, self.origin
        )
        # By the sessions before this one; a stream has them in its position.
        self.counted_before = [] if recipe.data.streaming else self.state.source_counts
        if group.main:
            remove_partial(self.out)
            atomic_write(self.out / RECIPE, recipe.to_yaml())
        return point

    def _resume(self, folder: Path) -> None:
        """Load a checkpoint; a stream has a position in each process."""
        if self.state.tokenizer != tokenizer_fingerprint(self.tokenizer):
            raise UnmaskError(
                f"resume_from_checkpoint: {folder} was trained with another tokenizer; set model.tokenizer as it was."
            )
        self.checkpointer.load(folder)
        if any(self.state.data):
            if len(self.state.data) != self.group.ranks:
                raise UnmaskError(
                    f"resume_from_checkpoint: {folder}: a stream resumes on as many processes as it was read by,"
                    f" {len(self.state.data)}; there are {self.group.ranks}."
                )
            self.steps.load_state_dict(self.state.data[self.group.rank])

    def _loop(self) -> None:
        """Take the optimizer steps, with what comes between them."""
        recipe, state = self.recipe, self.state
        self.shared.module.train()
        self.accounting.start()
        self.report.begin(state.step)
        self.signals.at_once = ""
        if state.evaluation_due:
            self._evaluate()
        while state.step < recipe.max_steps and not self._stopped_early() and self._step():
            state.step += 1
            self.report.advance(state.step)
            if state.step % recipe.log_steps == 0 or state.step in (1, recipe.max_steps):
                self._log()
            due = recipe.eval_steps is not None and state.step % recipe.eval_steps == 0
            state.evaluation_due = due and bool(self.stop)  # what takes long is left to the resumed run
            if due and not self.stop:
                self._evaluate()
                self._agree(0.0)
            if self.stop or (recipe.save_steps and state.step % recipe.save_steps == 0):
                self._save()
            if self.stop:
                self.report.close()
                self.say(f"stopped after step {state.step}; resume with resume_from_checkpoint=auto")
                leave(self.stop)
        self.report.end()

    def _step(self) -> bool:
        """Take one optimizer step; False if the data have ended."""
        recipe, group, step = self.recipe, self.group, self.state.step
        # 1. The batch of this process, a function of the step; what dropout draws is one, too.
        units = self.steps.at(step)
        if (recipe.data.streaming and None in group.gather(units and 1)) or units is None:
            self.data_ended = True
            return False
        torch.manual_seed((recipe.seed * 1_000_003 + step) * 4_096 + group.rank)
        objective = self.curriculum.at(step, self._epoch(step))
        # 2. Noise is data: drawn once, before the model.
        starts = range(0, len(units), self.micro_batch)
        batches = [self._corrupted(units[start : start + self.micro_batch], objective) for start in starts]
        # 3. One divisor for the whole step.
        divisor = torch.stack([loss_divisor(batch.noised, objective) for batch in batches]).sum()
        divisor = group.sum(divisor.to(torch.float64)).clamp(min=1)
        self.accounting.mark("data")
        # 4. Forward and backward. Gradients are averaged over processes, and the divisor counts all of them.
        losses = []
        for batch in batches:
            with nullcontext() if batch is batches[-1] else self.shared.accumulating():
                loss = self.shared.loss(batch.inputs, batch.noised, objective, divisor)
                self.accounting.mark("forward")
                (loss * group.ranks).backward()
            losses.append(loss.detach())
            self.accounting.mark("backward")
        most = recipe.optimizer.max_grad_norm or math.inf
        total = torch.nn.utils.clip_grad_norm_(self.shared.parameters.values(), most)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        # 5. All processes agree: is it finite, and has any of them been asked to stop?
        local = torch.stack(losses).tolist()
        loss = self._agree(sum(local))
        if math.isfinite(loss) and math.isfinite(norm):
            # 6. The optimizer, at the rate of this step.
            for optimizer in self.optimizers:
                for settings in optimizer.param_groups:
                    settings["lr"] = learning_rate(recipe, step)
                optimizer.step()
            if self.average is not None:
                self.average.update()
            self.state.skipped_in_a_row = 0
            self.state.loss_sum += loss
            self.state.loss_steps += 1
        else:
            self._non_finite(batches, local, norm)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.norm, self.objective = norm, objective
        self.accounting.mark("optimizer")
        return True

    def _corrupted(self, units: list[Unit], objective: Objective) -> MicroBatch:
        """Collate some units and draw their noise."""
        recipe, device = self.recipe, self.group.device
        rows = [unit.row for unit in units]
        arguments, ids = model_batch(rows, cast(int, self.tokenizer.pad_token_id), recipe, device)
        epochs = torch.tensor([unit.epoch for unit in units], device=device)
        seeds = example_seeds(recipe.seed, ids, epochs if ids.dim() == 1 else epochs[:, None])
        strata = None
        if recipe.model.time_sampling == "low_discrepancy":
            place = torch.tensor([unit.place for unit in units], device=device)
            strata = low_discrepancy(recipe.seed, self.state.step, place, total=self.data.step_rows)
            if ids.dim() == 2:
                strata = document_strata(strata, ids.shape[1])
        inputs = self.shared.model.prepare(**arguments, training_mode=recipe.training_mode)
        noised = corrupt(inputs, objective, seeds, strata)
        self.accounting.count(noised, objective)
        return MicroBatch(inputs, noised, units)

    def _agree(self, value: float) -> float:
        """Add up a value over the processes, and set `stop` if one of them received a signal."""
        values, signals = zip(*self.group.gather((value, self.signals.received)), strict=True)
        self.stop = max(signals)
        return sum(values)

    def _epoch(self, step: int) -> int:
        """Epoch of a step, for settings with one value an epoch; 0 where sources have their own epochs."""
        if self.recipe.data.streaming or self.recipe.data.sources is not None:
            return 0
        return step * self.data.step_rows // len(self.data.rows)

    def _non_finite(self, batches: list[MicroBatch], losses: list[float], norm: float) -> None:
        """Write the step down, and stop or leave it out: no weight and no state of the optimizer changes."""
        state, file = self.state, self.out / NON_FINITE
        mine = []
        for batch, loss in zip(batches, losses, strict=True):
            examples = [example for unit in batch.units for example in examples_of(unit.row)]
            records = [f"source {example.source} sample {example.sample_id}" for example in examples]
            mine.append({"process": self.group.rank, "loss": str(loss), "records": records})
        found = [batch for part in self.group.gather(mine) for batch in part]
        bad = [batch for batch in found if not math.isfinite(float(batch["loss"]))]
        entry = {"step": state.step + 1, "grad_norm": str(norm), "micro_batches": bad or found}
        if self.group.main:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(entry) + "\n")
        what = f"the loss is {bad[0]['loss']}" if bad else f"the gradient's norm is {norm}"
        said = f"step {state.step + 1}: {what} (its records are in {file})"
        state.skipped += 1
        state.skipped_in_a_row += 1
        remedy = "lower optimizer.learning_rate, remove the records, or set on_non_finite=skip"
        if self.recipe.on_non_finite == "skip":
            if state.skipped_in_a_row < IN_A_ROW:
                return self.say(f"{said}; the step is left out")
            remedy = f"{IN_A_ROW} steps in a row were left out: resume with a lower optimizer.learning_rate"
        newest = next(iter(checkpoints(self.out)), None)
        raise UnmaskError(f"{said}; no weight was changed; the newest checkpoint is {newest}; {remedy}.")

    def _log(self) -> None:
        """Log the mean loss since the last log."""
        state = self.state
        logs = {
            "step": state.step,
            "loss": state.loss_sum / state.loss_steps if state.loss_steps else math.nan,
            "grad_norm": self.norm,
            "learning_rate": learning_rate(self.recipe, state.step - 1),
            **({"skipped_steps": state.skipped} if state.skipped else {}),
            **{SHARE + name: share for name, share in self._source_shares().items()},
            **{f"curriculum/{name}": v for name, v in self.curriculum.state(self.objective).items()},
            **self.accounting.report(),
        }
        state.loss_sum, state.loss_steps = 0.0, 0
        state.history.append(logs)
        self.report.log(logs)

    def _source_counts(self) -> list[list[int]]:
        """Examples and tokens of each source so far, over all processes."""
        counts = self.group.sum(torch.tensor(self.steps.counts(), device=self.group.device))
        return (counts + torch.tensor(self.counted_before or 0, device=counts.device)).tolist()

    def _source_shares(self) -> dict[str, float]:
        """The share of each source of a mixture in the tokens so far."""
        tokens = [tokens for _, tokens in self._source_counts()] if len(self.source_names) > 1 else []
        return {name: n / max(1, sum(tokens)) for name, n in zip(self.source_names, tokens, strict=False)}

    def _evaluate(self) -> None:
        """Compute the held-out loss and a few samples, with the averaged weights where there are some."""
        self.accounting.mark("other")
        state, rows, sources = self.state, self.data.held_out_rows, self.data.held_out_sources
        with nullcontext() if self.average is None else self.average.in_place():
            pad = cast(int, self.tokenizer.pad_token_id)
            metrics = held_out_loss(self.shared, rows, sources, self.recipe, pad, self.micro_batch)
            texts = self.answers.sample(self.shared, state.step, self.out / SAMPLES)
        state.history.append({"step": state.step, **metrics})
        self.report.log(state.history[-1])
        self.report.draw(state.history)
        self.report.samples(texts, state.step)
        state.evaluation_due = False
        if state.step:  # there is no checkpoint of the weights before training to go back to
            state.without_improvement += 1
            if state.best_loss is None or metrics["eval_loss"] < state.best_loss:
                state.best_loss, state.best_step = metrics["eval_loss"], state.step
                state.without_improvement = 0
        self.accounting.mark("evaluation")

    def _stopped_early(self) -> bool:
        patience = self.recipe.early_stopping_patience
        return patience is not None and self.state.without_improvement >= patience

    def _save(self) -> None:
        """Write a checkpoint of this step, and remove old ones."""
        self.accounting.mark("other")
        self.state.tokenizer = tokenizer_fingerprint(self.tokenizer)
        self.state.data = self.group.gather(self.steps.state_dict())
        self.state.source_counts = self._source_counts()
        self.checkpointer.save(self.state)
        self.accounting.mark("save")

    def _finish(self) -> TrainResult:
        """Evaluate what was trained, and leave it with its model card."""
        recipe, state, prompts = self.recipe, self.state, self.answers.prompts
        # The rest is short work on what is trained; without a checkpoint of it, it would be lost.
        if recipe.save_steps is not None:
            self.signals.at_once = (
                f"stopped before {FINAL} was written; resume with resume_from_checkpoint=auto"
            )
        self._say_what_ended_it()
        early = recipe.early_stopping_patience is not None
        if early and state.best_step not in (None, state.step):
            self.checkpointer.load(self.out / f"{PREFIX}{state.best_step}")
        if self.average is not None:
            self.average.put()  # from here on the weights are the average
            self.average = None
        last = dict(*state.history[-1:])
        evaluated = last.get("step") == state.step and "eval_loss" in last
        if self.data.held_out and not early and not evaluated:
            self._evaluate()
            last = state.history[-1]
        held_out = state.best_loss if early else last.get("eval_loss")
        self.report.draw(state.history)
        self.accounting.report()
        for name, figure in self.accounting.summary().items():
            self.say(f"{name}: {figure}")
        after = self.answers.measure(self.shared, "after training")
        before = state.exact_before
        shares = (before, exact_share(after, prompts)) if before is not None and after else None
        result = TrainResult(self.out / FINAL, _mean_loss(state.history), held_out, shares)
        weights = self.shared.whole_weights(self.model) if self.shared.sharded else None

        def write() -> None:
            with atomic_dir(result.checkpoint) as aside:
                save_checkpoint(self.model, self.tokenizer, aside, weights)
                write_card(aside, self, result)

        self.group.on_main(write)
        if after and self.group.main:
            self.answers.show(after)
        self.say(f"checkpoint: {self.out / FINAL}   loss curve: {self.out / 'loss.png'}")
        if shares is not None:
            self.say(
                f"exact match: before {shares[0]:.1%}, after {shares[1]:.1%} on {len(prompts)} held-out prompts"
            )
        return result

    def _say_what_ended_it(self) -> None:
        """Say what ended the run, and what a mixture or a stream came to."""
        state, after = self.state, f"after step {self.state.step} of {self.recipe.max_steps}"
        if self.data_ended:
            self.say(f"the data ended {after}: every source has had its epochs")
        if shares := [f"{name} {share:.1%}" for name, share in self._source_shares().items()]:
            self.say(f"tokens of each source: {', '.join(shares)}")
        if self._stopped_early() and state.step < self.recipe.max_steps:
            self.say(f"stopped early {after}: {state.without_improvement} evaluations without a lower loss")
        if self.recipe.early_stopping_patience is not None:
            self.say(f"the result has the weights of step {state.best_step}, of the lowest held-out loss")


def _mean_loss(history: list[dict[str, float]]) -> float:
    """The mean over the steps; each entry is the mean since the one before."""
    total, last = 0.0, 0.0
    for log in history:
        if "loss" in log:
            total += log["loss"] * (log["step"] - last)
            last = log["step"]
    return total / last if last else math.nan
