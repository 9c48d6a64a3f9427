"""transformers.Trainer with the diffusion loss, its one normaliser, keyed noise and an exact evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from unmask.data.hub import first_line
from unmask.diffusion.noise import example_seeds
from unmask.errors import UnmaskError
from unmask.model.denoiser import IGNORED

EVALUATION_EPOCH = -1  # evaluation noise is that of an epoch that training never reaches


def count_supervised(batch: dict[str, Tensor], training_mode: str) -> Tensor:
    """Count the tokens of a batch that may be masked: not padding, not ignored, in "sft" not source."""
    maskable = batch["attention_mask"].bool() & (batch["labels"] != IGNORED)
    return (maskable & ~batch["src_mask"] if training_mode == "sft" else maskable).sum()


class DiffusionTrainer(Trainer):
    """Train a masked-diffusion model on batches of `unmask.data.collate`.

    What it changes in `Trainer`:
      - the loss: the sum of CE / t over masked tokens, divided by the number of supervised tokens of the
        whole optimizer step, over all micro-batches and processes (nats per supervised token);
      - the noise of a sample is a function of (seed, sample id, epoch) alone;
      - the evaluation loss is the same quantity over the whole evaluation set, with noise that never
        changes, so that two evaluations of one model agree to the bit;
      - a checkpoint that cannot be written leaves the earlier ones as they are.

    Args:
        training_mode: "pretrain" or "sft", as in the model's `forward`.
        Others as in `transformers.Trainer`; every example needs a sample id, and `args` needs
        `remove_unused_columns=False`.
    """

    # The loss is normalised over the optimizer step by us: Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, training_mode: str = "pretrain", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.training_mode = training_mode
        self.model_accepts_loss_kwargs = True  # what older versions read instead of the attribute above

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, and count their supervised tokens."""
        batches = []
        for batch in islice(epoch_iterator, num_batches):
            batches.append(self._labelled(batch))  # at once: what it asks for is true of the newest batch
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        counts = [count_supervised(batch, self.training_mode) for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        return cast(Tensor, self.accelerator.gather(count)).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the share of the optimizer step's loss that this micro-batch contributes."""
        outputs = self._denoise(model, inputs, int(self.state.epoch or 0), num_items_in_batch)
        # Gradients are averaged over processes, and the divisor already counts the tokens of all.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _denoise(
        self, model: Any, inputs: dict[str, Any], epoch: int, num_supervised: Tensor | int | None
    ) -> Any:
        return model(
            input_ids=inputs["input_ids"],
            labels=inputs["labels"],
            attention_mask=inputs["attention_mask"],
            src_mask=inputs["src_mask"] if self.training_mode == "sft" else None,
            training_mode=self.training_mode,
            noise_seed=example_seeds(self.args.seed, inputs["sample_ids"], epoch),
            num_supervised=num_supervised,
            return_logits=False,
        )

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
            batch = self._labelled(cast(dict[str, Tensor], self._prepare_inputs(batch)))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self._denoise(model, batch, EVALUATION_EPOCH, num_supervised=1).loss
            count = count_supervised(batch, self.training_mode)
            samples = (batch["labels"] != IGNORED).any(dim=1).sum()
            total += torch.stack([loss.double(), count.double(), samples.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = cast(Tensor, self.accelerator.reduce(total))
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1].clamp(min=1)).item()}
        return EvalLoopOutput(None, None, metrics, num_samples=int(total[2]))  # type: ignore[arg-type]

    def _labelled(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add labels: the ids, but nothing to learn in rows that only repeat others.

        Such rows make the last batch of an epoch even over the processes; counted, they would make the
        run depend on the number of processes.
        """
        ids = batch["input_ids"]
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes > 1 and state.end_of_dataloader:
            # Not accelerate's own `remainder`, which is wrong in an epoch that a resumed run enters midway.
            examples = len(cast(Any, state.active_dataloader).dataset)
            if remainder := examples % (len(ids) * processes):
                row = torch.arange(len(ids), device=ids.device) + len(ids) * self.accelerator.process_index
                return {**batch, "labels": ids.masked_fill((row >= remainder)[:, None], IGNORED)}
        return {**batch, "labels": ids}

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
