"""transformers.Trainer with the diffusion loss, its one normaliser, keyed noise and an exact evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from unmask.data.hub import first_line
from unmask.diffusion.curriculum import Curriculum
from unmask.diffusion.loss import loss_divisor
from unmask.diffusion.noise import example_seeds, low_discrepancy
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.model.inputs import IGNORED

EVALUATION_EPOCH = -1  # evaluation noise is that of an epoch that training never reaches


TimeSampling = Literal["independent", "low_discrepancy"]


class DiffusionTrainer(Trainer):
    """Train a masked-diffusion model on batches of `unmask.data.collate`.

    What it changes in `Trainer`:
      - the loss: what the curriculum's objective says for the step, a weighted sum over masked tokens. Its
        divisor is that of the whole optimizer step, over all micro-batches and processes: by default the
        number of supervised tokens (nats per supervised token);
      - the noise of a sample is a function of (seed, sample id, epoch) alone, or with low discrepancy also
        of the sample's place in the optimizer step;
      - the evaluation loss is the bound (preset "elbo") in nats per supervised token over the whole
        evaluation set, whatever objective is trained: plain masks, the whole source as context, attention
        as the checkpoint will have it. Its noise never changes, so two evaluations of one model agree to
        the bit, and those of runs with other curricula compare;
      - a checkpoint that cannot be written leaves the earlier ones as they are.

    Args:
        training_mode: "pretrain" or "sft", as in the model's `forward`.
        curriculum: the objective of each step; by default the plain bound with the config's `noise_eps`.
        time_sampling: "independent", or "low_discrepancy": the masking rates of an optimizer step are
            spread evenly over its samples.
        Others as in `transformers.Trainer`; every example needs a sample id, and `args` needs
        `remove_unused_columns=False`.
    """

    # The loss is normalised over the optimizer step by us: Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        training_mode: str = "pretrain",
        curriculum: Curriculum | None = None,
        time_sampling: TimeSampling = "independent",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.training_mode = training_mode
        eps = cast(Any, self.model).config.noise_eps
        self.curriculum = Curriculum(noise_eps=(eps,)) if curriculum is None else curriculum
        self.time_sampling = time_sampling
        self.evaluated = Objective(eps=eps)
        self.model_accepts_loss_kwargs = True  # what older versions read instead of the attribute above

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, seed their noise, and count the step's divisor."""
        batches: list[dict[str, Any]] = []
        taken = 0  # samples of this step in the micro-batches before, over all processes
        for batch in islice(epoch_iterator, num_batches):
            # At once: what `_repeated` asks for is true of the newest batch.
            rows, processes = len(batch["input_ids"]), self.accelerator.num_processes
            repeated = self._repeated(rows)
            row = torch.arange(rows, device=batch["input_ids"].device)
            place = taken + rows * self.accelerator.process_index + row
            batches.append({**self._labelled(batch, repeated), "place": place})
            batches[-1]["noise_seed"] = self._seeds(batch, self._epoch)
            taken += rows * processes - repeated
        for batch in batches:
            batch["total"] = taken
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        divisors = [self._divisor(batch, self._objective) for batch in batch_samples]
        divisor = torch.stack(divisors).sum().to(device)
        return cast(Tensor, self.accelerator.gather(divisor)).sum() if self.args.world_size > 1 else divisor

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the share of the optimizer step's loss that this micro-batch contributes."""
        outputs = self._denoise(model, inputs, self._objective, num_items_in_batch)
        # Gradients are averaged over processes, and the divisor already counts all of them.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Both change only after the last micro-batch of a step.
    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    @property
    def _objective(self) -> Objective:
        return self.curriculum.at(self.state.global_step, self._epoch)

    def _denoise(
        self, model: Any, batch: dict[str, Any], objective: Objective, divisor: Tensor | int | None
    ) -> Any:
        return model(**self._arguments(batch, objective), divisor=divisor, return_logits=False)

    def _divisor(self, batch: dict[str, Any], objective: Objective) -> Tensor:
        """What a batch adds to the divisor of its optimizer step."""
        model = cast(Any, self.accelerator.unwrap_model(cast(Any, self.model)))
        arguments = self._arguments(batch, objective)
        # Repeated rows are no tokens either: a preset may divide by all tokens, prompts included.
        arguments["attention_mask"] = batch["attention_mask"] * (batch["labels"] != IGNORED)
        return loss_divisor(model.draw_noise(**arguments), objective)

    def _arguments(self, batch: dict[str, Any], objective: Objective) -> dict[str, Any]:
        """What `forward` and `draw_noise` are called with alike."""
        strata = None
        # Made only now: a float in the batch would be cast to the model's type by DeepSpeed.
        if self.time_sampling == "low_discrepancy" and "place" in batch:
            strata = low_discrepancy(
                self.args.seed, self.state.global_step, batch["place"], total=batch["total"]
            )
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "attention_mask": batch["attention_mask"],
            "src_mask": batch["src_mask"] if self.training_mode == "sft" else None,
            "training_mode": self.training_mode,
            "noise_seed": batch["noise_seed"],
            "strata": strata,
            "objective": objective,
        }

    def _seeds(self, batch: dict[str, Tensor], epoch: int) -> Tensor:
        return example_seeds(self.args.seed, batch["sample_ids"], epoch)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the loss over the whole set: one sum over one count, whatever the batch size."""
        model = self._wrap_model(cast(Any, self.model), training=False, dataloader=dataloader)
        model.eval()
        total = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # loss, tokens, samples
        for batch in dataloader:
            batch = cast(dict[str, Any], self._prepare_inputs(batch))
            batch = self._labelled(batch, self._repeated(len(batch["input_ids"])))
            batch["noise_seed"] = self._seeds(batch, EVALUATION_EPOCH)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self._denoise(model, batch, self.evaluated, divisor=1).loss
            count = self._divisor(batch, self.evaluated)
            samples = (batch["labels"] != IGNORED).any(dim=1).sum()
            total += torch.stack([loss.double(), count.double(), samples.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = cast(Tensor, self.accelerator.reduce(total))
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1].clamp(min=1)).item()}
        return EvalLoopOutput(None, None, metrics, num_samples=int(total[2]))  # type: ignore[arg-type]

    def _repeated(self, rows: int) -> int:
        """Count the rows of the newest batch, of all processes, that only repeat others.

        They make the last batch of an epoch even over the processes; counted, they would make the run
        depend on the number of processes. They are the last ones.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader:
            return 0
        # Not accelerate's own `remainder`, which is wrong in an epoch that a resumed run enters midway.
        examples = len(cast(Any, state.active_dataloader).dataset)
        return -examples % (rows * processes)

    def _labelled(self, batch: dict[str, Tensor], repeated: int) -> dict[str, Any]:
        """Add labels: the ids, but nothing to learn in the last `repeated` rows over all processes."""
        ids = batch["input_ids"]
        if not repeated:
            return {**batch, "labels": ids}
        row = torch.arange(len(ids), device=ids.device) + len(ids) * self.accelerator.process_index
        learnt = row < len(ids) * self.accelerator.num_processes - repeated
        return {**batch, "labels": ids.masked_fill(~learnt[:, None], IGNORED)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _named(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not _is_failed_write(error):
                raise
            raise UnmaskError(
                f"{folder}: could not be written: {first_line(error)}; earlier checkpoints are as they were:"
                " make room and go on with resume_from_checkpoint=auto."
            ) from error


@contextmanager
def _named(checkpoint: str | None) -> Iterator[None]:
    """Say which checkpoint it is that cannot be resumed from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, UnpicklingError, EOFError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} cannot be loaded: {first_line(error)}; it may be damaged,"
            " or of another model or optimizer than the recipe's."
        ) from error


def _is_failed_write(error: BaseException) -> bool:
    # torch.save speaks of a full disk in a RuntimeError with the words of its zip writer.
    words = ("write", "inline_container", "iostream")
    return isinstance(error, OSError | SafetensorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
