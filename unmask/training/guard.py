"""Between a step's gradient and its optimizer: is the loss a number, and is the run asked to stop?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmask.data.hub import first_line
from unmask.errors import UnmaskError
from unmask.training.checkpoints import newest_whole
from unmask.training.stop import StopSignals

if TYPE_CHECKING:
    from unmask.training.trainer import DiffusionTrainer

NON_FINITE = "non_finite.jsonl"  # in the run's folder: the steps whose loss or gradient was no number
PENDING = "pending.json"  # in a checkpoint: what the run owes since its last log
IN_A_ROW = 10  # steps skipped one after another that end a run: its weights are beyond help
SHOWN = 8  # sample ids in a message


class StepGuard(TrainerCallback):
    """Judges every optimizer step before it is taken; all processes come to the same verdict.

    A loss or gradient that is NaN or infinite ends the run, or leaves the step out: no weight and no state
    of the optimizer changes. A signal ends the run after the step, with a checkpoint. As one of the
    trainer's `also_saved` it also carries the loss since the last log over to the resumed run.

    Args:
        on_non_finite: "stop" or "skip".
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        signals: StopSignals,
        console: Console,
        on_non_finite: Literal["stop", "skip"] = "stop",
    ):
        self.trainer, self.signals, self.console = trainer, signals, console
        self.on_non_finite = on_non_finite
        self.stopped = 0  # the signal that all processes obey
        self.in_a_row = 0
        self.evaluation_due = False
        self.loss_before = torch.zeros(())
        self.pending: dict[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            losses = pending["losses"]
            same = len(losses) == args.world_size
            self.trainer._tr_loss.fill_(losses[args.process_index] if same else sum(losses) / len(losses))
            self.trainer._globalstep_last_logged = pending["last_logged"]
            if pending["evaluation_due"]:
                metrics = self.trainer._evaluate(cast(Any, None), None, skip_scheduler=True)
                self.trainer._determine_best_metric(metrics, cast(Any, None))
        self.signals.at_once = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses = torch.stack([loss.reshape(()) for loss, _ in self.trainer.micro_losses])
        norm = torch.as_tensor(self.trainer.grad_norm, device=losses.device, dtype=torch.float32)
        bad = ~(losses.isfinite().all() & norm.isfinite())
        self.stopped, found = self._agree(self.signals.received, bad)
        if found:
            self._non_finite(state.global_step + 1)
        else:
            self.in_a_row = 0
        self.trainer.micro_losses.clear()  # the next step may have fewer of them

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.evaluation_due = False
        if self.stopped:
            # What takes long is left to the resumed run.
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.trainer.is_in_train and not self.signals.at_once:
            self.stopped, _found = self._agree(self.signals.received, torch.zeros((), dtype=torch.bool))
            if self.stopped:
                control.should_save = control.should_training_stop = True

    def save(self, folder: Path) -> None:
        """Write `pending.json`."""
        losses = self._gathered([self.trainer._tr_loss.item()])
        if self.trainer.args.should_save:
            pending = {
                "last_logged": self.trainer._globalstep_last_logged,
                "losses": losses,
                "skipped": self.trainer.skipped_steps,
                "in_a_row": self.in_a_row,
                "evaluation_due": self.evaluation_due,
            }
            (folder / PENDING).write_text(json.dumps(pending) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read `pending.json`, for the beginning of the training."""
        try:
            pending = json.loads((folder / PENDING).read_text(encoding="utf-8"))
            self.trainer.skipped_steps, self.in_a_row = pending["skipped"], pending["in_a_row"]
            self.pending = pending
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnmaskError(
                f"resume_from_checkpoint: {folder / PENDING} cannot be read: {first_line(error)}; name an"
                " earlier checkpoint."
            ) from error

    def _agree(self, signal: int, bad: torch.Tensor) -> tuple[int, bool]:
        """The highest signal that any process received, and whether any found something bad."""
        device = self.trainer.args.device
        both = torch.stack([torch.tensor(signal, device=device), bad.to(device).long()])
        if self.trainer.args.world_size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        number, found = both.tolist()
        return number, bool(found)

    def _gathered(self, items: list[Any]) -> list[Any]:
        return gather_object(items) if self.trainer.args.world_size > 1 else items

    def _non_finite(self, step: int) -> None:
        """Write the step down, and stop or leave it out."""
        out = Path(cast(str, self.trainer.args.output_dir))
        record = {"step": step, "grad_norm": str(float(self.trainer.grad_norm))}
        batches = self._gathered(self._micro_batches())
        bad = [batch for batch in batches if not math.isfinite(float(batch["loss"]))]
        record["micro_batches"] = bad or batches  # of a gradient any of them may be the cause
        if self.trainer.args.should_save:
            try:
                with (out / NON_FINITE).open("a", encoding="utf-8") as opened:
                    opened.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UnmaskError(f"{out / NON_FINITE}: could not be written: {error.strerror}.") from error
        said = f"step {step}: {_say(record)} (see {out / NON_FINITE})"
        self.in_a_row += 1
        if self.on_non_finite == "skip" and self.in_a_row < IN_A_ROW:
            self._leave_out()
            self.console.print(f"{said}; the step is left out", markup=False, highlight=False)
            return
        newest, _ = newest_whole(out)
        place = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
        if self.on_non_finite == "skip":
            raise UnmaskError(
                f"{said}; {IN_A_ROW} steps in a row were such: no further one can help. {place}: go on from"
                " an earlier one with a lower optimizer.learning_rate."
            )
        raise UnmaskError(
            f"{said}; no weight was changed by it, and {place}. Lower optimizer.learning_rate, take the"
            " samples out, or leave such steps out with on_non_finite=skip."
        )

    def _micro_batches(self) -> list[dict[str, Any]]:
        return [
            {
                "process": self.trainer.args.process_index,
                "micro_batch": number,
                "loss": str(float(loss)),
                "sample_ids": [i for i in ids.flatten().tolist() if i >= 0],
            }
            for number, (loss, ids) in enumerate(self.trainer.micro_losses)
        ]

    def _leave_out(self) -> None:
        """Let the optimizer find no gradient, and the log no loss."""
        for parameter in cast(Any, self.trainer.model_wrapped).parameters():
            parameter.grad = None  # zeros would still move a weight by its momentum
        self.trainer._tr_loss.copy_(self.loss_before)
        self.trainer._globalstep_last_logged += 1
        self.trainer.skipped_steps += 1


def _say(record: dict[str, Any]) -> str:
    bad = [batch for batch in record["micro_batches"] if not math.isfinite(float(batch["loss"]))]
    ids = [i for batch in bad or record["micro_batches"] for i in batch["sample_ids"]]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    what = f"the loss is {bad[0]['loss']}" if bad else f"the gradient's norm is {record['grad_norm']}"
    return f"{what}, of the samples {', '.join(map(str, ids[:SHOWN]))}{more}"
